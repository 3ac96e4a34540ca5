"""A prompt's key/value prefix: computed once, put before every text, in batches whose rows have different prompts.

Shapes: B rows, T tokens of text, l prompt vectors, L those of a batch's longest, h key/value heads, e their width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@dataclass(frozen=True, eq=False)
class Prefix:
    """The keys and values of one prompt in every layer, each (l, h, e)."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    length: int

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(each.nbytes for layer in self.layers for each in layer)

    @classmethod
    def of(cls, cache: DynamicCache) -> Prefix:
        """What a pass over one prompt left in ``cache``: every layer (1, h, l, e) -> (l, h, e)."""
        layers = [
            tuple(each[0].transpose(0, 1).contiguous() for each in (layer.keys, layer.values)) for layer in cache.layers
        ]
        return cls(tuple(layers), layers[0][0].shape[0])


def can_keep_prefix(body: nn.Module, config: Any) -> bool:
    """Whether keys and values are all that a text sees of a prompt: attention in every layer, no recurrent state."""
    if "past_key_values" not in inspect.signature(body.forward).parameters:
        return False
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def behind(prefixes: Sequence[Prefix], tokens: int, device: torch.device) -> dict[str, Any]:
    """What a body's forward takes so that row i of B rows with T = ``tokens`` stands behind ``prefixes[i]``.

    Shorter prefixes are padded on the left, hidden by the mask, and every row counts its positions from its own
    prompt's end: each result is that of the row alone.
    """
    layers: list[Any] = [
        _RowsLayer([keys for keys, _ in of_rows], [values for _, values in of_rows])
        for of_rows in zip(*(prefix.layers for prefix in prefixes), strict=True)
    ]
    found: dict[str, Any] = {"past_key_values": Cache(layers=layers), "use_cache": True}
    lengths = torch.tensor([prefix.length for prefix in prefixes])  # (B,)
    longest = int(lengths.max())
    if int(lengths.min()) < longest:
        place = torch.arange(longest + tokens)
        found["attention_mask"] = (place >= longest - lengths[:, None]).long().to(device)  # (B, L + T)
        found["position_ids"] = (lengths[:, None] + torch.arange(tokens)).to(device)  # (B, T)
    return found


class _RowsLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's prefixes, joined when the layer runs and forgotten afterwards: one layer at a time is copied."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        self._parts = (keys, values)
        self._length = max(each.shape[0] for each in keys)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of prefix and text, (B, h, L + T, e) each."""
        joined = [
            torch.cat([pad_sequence(list(parts), batch_first=True, padding_side="left").transpose(1, 2), own], dim=-2)
            for parts, own in zip(self._parts, (key_states, value_states), strict=True)
        ]
        return joined[0], joined[1]

    def get_seq_length(self) -> int:
        return self._length
