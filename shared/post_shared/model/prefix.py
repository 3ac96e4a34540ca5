"""Prompts and rows as keys and values: the prefix that serving caches, and the growing cache of generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from post_shared.engine.kv_cache import Prefix

__all__ = ["Prefix", "RowCache"]


class RowCache:
    """Keys and values of rows being generated, padded on the left so that all rows continue at the same position."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return int(self.cache.get_seq_length())

    def keep(self, rows: Tensor, positions: Tensor) -> None:
        """Keep ``positions`` (B', S') of ``rows`` (B',)."""
        for layer in self.cache.layers:
            layer.pick(rows, positions)

    def append(self, other: RowCache) -> None:
        """Add the rows of ``other``."""
        for layer, added in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.append(added)

    @staticmethod
    def last(count: int, length: int, rows: int) -> Tensor:
        """The last ``count`` of ``length`` positions, for each of ``rows`` rows: (rows, count)."""
        return torch.arange(length - count, length).expand(rows, -1)
