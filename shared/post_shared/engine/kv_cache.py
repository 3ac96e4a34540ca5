"""A prompt's key/value prefix: computed once and put before every text, also in batches with a prompt per row.

Shapes: B rows, T tokens of text, l prompt vectors, L those of the longest prompt in a batch, h key/value heads, e their
width, S positions of a growing cache.
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
        """Memory of the keys and values, in bytes."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def emptied(self) -> Prefix:
        """The prefix of no prompt, for batches in which only some rows have one."""
        return Prefix(tuple((keys[:0], values[:0]) for keys, values in self.layers), 0)

    @classmethod
    def of(cls, cache: DynamicCache) -> Prefix:
        """The prefix from the ``cache`` of a pass over one prompt: every layer (1, h, l, e) -> (l, h, e)."""
        layers = [
            tuple(states[0].transpose(0, 1).contiguous() for states in (layer.keys, layer.values))
            for layer in cache.layers
        ]
        return cls(tuple(layers), layers[0][0].shape[0])


def can_keep_prefix(body: nn.Module, config: Any) -> bool:
    """Whether a text sees nothing of a prompt but keys and values: attention in every layer, no recurrent state."""
    if "past_key_values" not in inspect.signature(body.forward).parameters:
        return False
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def inputs_behind(
    prefixes: Sequence[Prefix], tokens: int, device: torch.device, *, growing: bool = False
) -> dict[str, Any]:
    """Arguments of a body's forward that put row i of B rows with T = ``tokens`` behind ``prefixes[i]``.

    Shorter prefixes are padded on the left and masked, and every row counts its positions from its own prompt's end:
    each result equals that of the row alone. With ``growing``, the cache also stores the texts (generation).
    """
    layer_class = GrowingLayer if growing else _PassingLayer
    by_layer = zip(*(prefix.layers for prefix in prefixes), strict=True)  # (keys, values) of each row
    layers = [layer_class([keys for keys, _ in rows], [values for _, values in rows]) for rows in by_layer]
    lengths = torch.tensor([prefix.length for prefix in prefixes])  # (B,)
    return {
        "past_key_values": Cache(layers=layers),
        "use_cache": True,
        **left_padding(lengths, int(lengths.max()), tokens, device),
    }


def left_padding(lengths: Tensor, longest: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Mask (B, longest + T) and positions (B, T) of T new tokens behind B rows of ``lengths``; {} if none is padded."""
    if int(lengths.min()) == longest:
        return {}
    positions = torch.arange(longest + tokens)
    return {
        "attention_mask": (positions >= longest - lengths[:, None]).long().to(device),
        "position_ids": (lengths[:, None] + torch.arange(tokens)).to(device),
    }


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """Rows (l, h, e) of different l -> (B, h, L, e), padded on the left."""
    return pad_sequence(list(rows), batch_first=True, padding_side="left").transpose(1, 2)


class RowsLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values of the rows' prefixes, (B, h, L, e) each. Those of texts are appended, not stored."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._states, self._length = (keys, values), int(keys.shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of prefix and text, (B, h, L + T, e) each."""
        keys, values = self._prefix()
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self._length

    def _prefix(self) -> tuple[Tensor, Tensor]:
        return self._states


class _PassingLayer(RowsLayer):
    """One layer's prefixes, joined when the layer runs and freed afterwards: only one layer is copied at a time."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        DynamicLayer.__init__(self)
        self._parts = (keys, values)
        self._length = max(row.shape[0] for row in keys)

    def _prefix(self) -> tuple[Tensor, Tensor]:
        keys, values = map(_joined, self._parts)
        return keys, values


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, (B, h, S, e), with reserved space: a step copies one position, not all before it."""

    _RESERVED = 64

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        self._buffers = (_joined(keys), _joined(values))
        self._length = int(self._buffers[0].shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the new positions; returns keys and values of all positions."""
        start, self._length = self._length, self._length + key_states.shape[-2]
        if self._length > self._buffers[0].shape[-2]:
            added = self._length + self._RESERVED - self._buffers[0].shape[-2]
            self._buffers = (
                nn.functional.pad(self._buffers[0], (0, 0, 0, added)),
                nn.functional.pad(self._buffers[1], (0, 0, 0, added)),
            )
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self._length] = new
        return self._used()

    def get_seq_length(self) -> int:
        return self._length

    def pick(self, rows: Tensor, positions: Tensor) -> None:
        """Keep ``positions`` (B', S') of ``rows`` (B',)."""
        keys, values = (states.transpose(1, 2)[rows[:, None], positions].transpose(1, 2) for states in self._used())
        self._buffers, self._length = (keys, values), int(positions.shape[1])

    def append(self, other: GrowingLayer) -> None:
        """Append the rows of ``other``; the shorter of the two is padded on the left."""
        length = max(self._length, other._length)
        keys, values = (
            torch.cat([nn.functional.pad(states, (0, 0, length - states.shape[-2], 0)) for states in pair])
            for pair in zip(self._used(), other._used(), strict=True)
        )
        self._buffers, self._length = (keys, values), length

    def _used(self) -> tuple[Tensor, Tensor]:
        return self._buffers[0][:, :, : self._length], self._buffers[1][:, :, : self._length]
