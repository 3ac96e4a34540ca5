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

    def emptied(self) -> Prefix:
        """That of no prompt, for rows without one among rows with one."""
        return Prefix(tuple((keys[:0], values[:0]) for keys, values in self.layers), 0)

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


def behind(prefixes: Sequence[Prefix], tokens: int, device: torch.device, *, keep: bool = False) -> dict[str, Any]:
    """What a body's forward takes so that row i of B rows with T = ``tokens`` stands behind ``prefixes[i]``.

    Shorter prefixes are padded on the left, hidden by the mask, and every row counts its positions from its own
    prompt's end: each result is that of the row alone. With ``keep`` the cache goes on growing (generation).
    """
    make = GrowingLayer if keep else _PassingLayer
    parts = zip(*(prefix.layers for prefix in prefixes), strict=True)  # by layer, (keys, values) of each row
    layers = [make([keys for keys, _ in rows], [values for _, values in rows]) for rows in parts]
    lengths = torch.tensor([prefix.length for prefix in prefixes])  # (B,)
    return {
        "past_key_values": Cache(layers=layers),
        "use_cache": True,
        **padded_on_the_left(lengths, int(lengths.max()), tokens, device),
    }


def padded_on_the_left(lengths: Tensor, longest: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Mask (B, longest + T) and positions (B, T) of T new tokens behind B rows of ``lengths``; none when alike."""
    if int(lengths.min()) == longest:
        return {}
    place = torch.arange(longest + tokens)
    return {
        "attention_mask": (place >= longest - lengths[:, None]).long().to(device),
        "position_ids": (lengths[:, None] + torch.arange(tokens)).to(device),
    }


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows (l, h, e) of different l -> (B, h, L, e), padded on the left."""
    return pad_sequence(list(parts), batch_first=True, padding_side="left").transpose(1, 2)


class RowsLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values of rows' prefixes, (B, h, L, e) each. Those of texts are put behind, and not kept."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._seen, self._length = (keys, values), int(keys.shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of prefix and text, (B, h, L + T, e) each."""
        keys, values = self._prefix()
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self._length

    def _prefix(self) -> tuple[Tensor, Tensor]:
        return self._seen


class _PassingLayer(RowsLayer):
    """One layer's prefixes, joined when the layer runs and forgotten afterwards: one layer at a time is copied."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        DynamicLayer.__init__(self)
        self._parts = (keys, values)
        self._length = max(each.shape[0] for each in keys)

    def _prefix(self) -> tuple[Tensor, Tensor]:
        keys, values = map(_joined, self._parts)
        return keys, values


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, (B, h, S, e) with room for more: a step copies one position, not all before it."""

    _ROOM = 64

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        self._kept = (_joined(keys), _joined(values))
        self._length = int(self._kept[0].shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add the new positions; keys and values of all."""
        start, self._length = self._length, self._length + key_states.shape[-2]
        if self._length > self._kept[0].shape[-2]:
            more = self._length + self._ROOM - self._kept[0].shape[-2]
            self._kept = (
                nn.functional.pad(self._kept[0], (0, 0, 0, more)),
                nn.functional.pad(self._kept[1], (0, 0, 0, more)),
            )
        for kept, new in zip(self._kept, (key_states, value_states), strict=True):
            kept[:, :, start : self._length] = new
        return self._all()

    def get_seq_length(self) -> int:
        return self._length

    def pick(self, rows: Tensor, places: Tensor) -> None:
        """Keep of ``rows`` (B',) the positions ``places`` (B', S')."""
        keys, values = (each.transpose(1, 2)[rows[:, None], places].transpose(1, 2) for each in self._all())
        self._kept, self._length = (keys, values), int(places.shape[1])

    def append(self, other: GrowingLayer) -> None:
        """Add the rows of ``other``, the shorter of the two padded on the left."""
        length = max(self._length, other._length)
        keys, values = (
            torch.cat([nn.functional.pad(each, (0, 0, length - each.shape[-2], 0)) for each in both])
            for both in zip(self._all(), other._all(), strict=True)
        )
        self._kept, self._length = (keys, values), length

    def _all(self) -> tuple[Tensor, Tensor]:
        return self._kept[0][:, :, : self._length], self._kept[1][:, :, : self._length]
