"""Prompts and rows as keys and values: what serving keeps of a prompt, and what generation grows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from post_shared.engine.kv_cache import Prefix
from post_shared.engine.shared_prefix import PrefixRows, SharedPrefix

__all__ = ["Prefix", "PrefixRows", "RowCache", "SharedPrefix"]


class RowCache:
    """Keys and values of rows under way, padded on the left: all rows continue at the same place."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return int(self.cache.get_seq_length())

    def keep(self, rows: Tensor, places: Tensor) -> None:
        """Keep of ``rows`` (B',) the positions ``places`` (B', S')."""
        for layer in self.cache.layers:
            layer.pick(rows, places)

    def append(self, other: RowCache) -> None:
        """Add the rows of ``other``."""
        for mine, more in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.append(more)

    @staticmethod
    def last(count: int, length: int, rows: int) -> Tensor:
        """The last ``count`` of ``length`` places, for each of ``rows`` rows: (rows, count)."""
        return torch.arange(length - count, length).expand(rows, -1)
