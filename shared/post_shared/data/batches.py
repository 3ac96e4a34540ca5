"""Rows of token ids, encoded once, and the batches cut from them.

Rows are padded on the right, so a causal model needs no attention mask and positions equal those of a single row. A
batch carries its answer positions: the head is applied nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from post_shared.errors import InvalidInput

IGNORE_INDEX = -100
"""Target value of positions without an expected token."""


PASS_COST = 48
"""Tokens of padding that cost about as much as one more pass through the model."""


@dataclass(frozen=True)
class EncodedRow:
    """One text in the template. ``positions`` are the answer positions; ``tokens`` the tokens expected there
    (generation only); ``label`` the index of its label, if known; ``truncated`` whether the text was too long."""

    token_ids: list[int]
    positions: list[int]
    tokens: list[int]
    label: int | None
    truncated: bool = False


@dataclass(frozen=True)
class Batch:
    """Rows ``index`` of ``encoded``. B rows, T tokens in the longest (at least ``min_length``), P answer positions."""

    encoded: EncodedRows
    index: tuple[int, ...]
    min_length: int = 0

    def __len__(self) -> int:
        return len(self.index)

    def split(self, size: int, *, tokens: int | None = None, reserved: int = 0) -> list[Batch]:
        """Split into micro-batches of at most ``size`` rows, with the least padding.

        ``tokens`` limits a micro-batch of more than one row, counting padding and ``reserved`` tokens per row."""
        return [self.part(places) for places in self.places(size, tokens=tokens, reserved=reserved)]

    def part(self, places: Sequence[int]) -> Batch:
        """The rows at these places in the batch."""
        return Batch(self.encoded, tuple(self.index[place] for place in places))

    def places(
        self, size: int, *, tokens: int | None = None, reserved: int = 0, cost: int = PASS_COST
    ) -> list[list[int]]:
        """As :meth:`split`, as places in this batch: rows are sorted by length and cut where padding and parts
        (``cost`` tokens each) cost least in total."""
        lengths = [self.encoded.length(row) for row in self.index]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        best = [(0, 0)]  # for the first n rows: the least cost, and where its last part begins
        for end in range(1, len(order) + 1):
            longest = lengths[order[end - 1]]
            max_rows = max(1, min(size, end, end if tokens is None else tokens // (longest + reserved)))
            best.append(min((best[end - n][0] + n * longest + cost, end - n) for n in range(1, max_rows + 1)))
        parts, end = [], len(order)
        while end:
            parts.append(order[best[end][1] : end])
            end = best[end][1]
        return parts[::-1]

    def answers_at(self, places: Sequence[int]) -> Tensor:
        """Indices of the batch's answer positions that belong to the rows at ``places``, in that order."""
        return torch.tensor([n for place in places for n in range(self._answers[place], self._answers[place + 1])])

    @cached_property
    def _answers(self) -> list[int]:
        """Where each row's answer positions begin, and where the last one's end."""
        return [0, *accumulate(len(row.positions) for row in self._rows)]

    @cached_property
    def _rows(self) -> list[EncodedRow]:
        return [self.encoded.rows[row] for row in self.index]

    @cached_property
    def longest(self) -> int:
        """Tokens to which rows are padded: those of the longest row, or ``min_length`` if that is more."""
        return max(self.min_length, max(len(row.token_ids) for row in self._rows))

    @cached_property
    def token_ids(self) -> Tensor:
        """(B, T), padded on the right with 0."""
        return torch.tensor([row.token_ids + [0] * (self.longest - len(row.token_ids)) for row in self._rows])

    @cached_property
    def attention_mask(self) -> Tensor:
        """(B, T): 1 where there is a token."""
        lengths = torch.tensor([len(row.token_ids) for row in self._rows])
        return (torch.arange(self.longest)[None, :] < lengths[:, None]).long()

    @cached_property
    def rows(self) -> Tensor:
        """(P,): the row of each answer position."""
        return torch.tensor([place for place, row in enumerate(self._rows) for _ in row.positions])

    @cached_property
    def positions(self) -> Tensor:
        """(P,): the index of each answer position in its row, not counting a prompt."""
        return torch.tensor([position for row in self._rows for position in row.positions])

    @cached_property
    def tokens(self) -> Tensor:
        """(P,): the tokens expected at the answer positions (generation)."""
        return torch.tensor([token for row in self._rows for token in row.tokens])

    @cached_property
    def labels(self) -> Tensor:
        """(B,): indices into ``task.labels``."""
        return torch.tensor([-1 if row.label is None else row.label for row in self._rows])


@dataclass(frozen=True)
class EncodedRows:
    """A data set in token ids, ready to be cut into batches."""

    rows: tuple[EncodedRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def length(self, row: int) -> int:
        return len(self.rows[row].token_ids)

    def batch(self, index: Sequence[int]) -> Batch:
        return Batch(self, tuple(int(row) for row in index))

    @property
    def whole(self) -> Batch:
        """All rows, in their order."""
        return self.batch(range(len(self)))

    def in_order_of_length(self, size: int) -> Iterator[Batch]:
        """All rows once, similar lengths together, for callers that don't depend on the order."""
        yield from self.whole.split(size)


class ShuffledBatches:
    """Batch ``step`` of endless seeded epochs: a function of (seed, step), so a resumed run sees the same batches.

    Rows of similar length share a batch: a window of eight batches is drawn at random, sorted by length and cut, and
    its batches are shuffled. With ``rows``, only these rows are used.
    """

    WINDOW = 8

    def __init__(self, encoded: EncodedRows, batch_size: int, seed: int, *, rows: Sequence[int] | None = None) -> None:
        self.rows = list(range(len(encoded))) if rows is None else list(rows)
        if not self.rows:
            raise InvalidInput("there are no rows to make batches of")
        self.encoded = encoded
        self.batch_size = min(batch_size, len(self.rows))
        self.seed = seed
        self.per_epoch = len(self.rows) // self.batch_size
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __call__(self, step: int) -> Batch:
        epoch, number = divmod(step, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._plan(epoch))
        return self.encoded.batch(self._epoch[1][number])

    def _plan(self, epoch: int) -> list[list[int]]:
        generator = random.Random(f"{self.seed}/{epoch}")  # noqa: S311  not secret: plain tuning and public data
        order = list(self.rows)
        generator.shuffle(order)
        order = order[: self.per_epoch * self.batch_size]
        batches: list[list[int]] = []
        window = self.WINDOW * self.batch_size
        for start in range(0, len(order), window):
            by_length = sorted(order[start : start + window], key=self.encoded.length)
            cut = [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
            generator.shuffle(cut)
            batches += cut
        return batches
