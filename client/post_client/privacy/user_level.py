"""PromptDPSGD per user: users are sampled, and what one user does to the sum is bounded, however many their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from post_client.privacy.dp_optimizer import PromptDPSGD
from post_shared.data.batches import Batch
from post_shared.data.rows import Row
from post_shared.errors import DataInvalid
from post_shared.training.optimizer import Loss


def users_of(rows: Sequence[Row]) -> list[int]:
    """The user of each row, numbered in the order in which they appear.

    Raises:
        DataInvalid: a row names no user.
    """
    unnamed = sum(row.user is None for row in rows)
    if unnamed:
        raise DataInvalid(f"{unnamed} of {len(rows)} rows name no user; privacy per user needs one for each")
    numbers: dict[str | None, int] = {}
    return [numbers.setdefault(row.user, len(numbers)) for row in rows]


def rows_by_user(users: Sequence[int]) -> list[list[int]]:
    """The rows of each user: (user of each row) -> (rows of each user)."""
    rows: list[list[int]] = [[] for _ in range(max(users, default=-1) + 1)]
    for row, user in enumerate(users):
        rows[user].append(row)
    return rows


class UserDPSGD(PromptDPSGD):
    """As :class:`PromptDPSGD`, but the *sum* of the gradients of a user's rows is clipped to c.

    A batch holds all rows of the users that were drawn. A user's rows are added up one after the other in their order
    in the data, so that the sum is a function of that user's rows alone, to the last bit.
    """

    def __init__(self, prompt: nn.Parameter, learning_rate: float, *, users: Sequence[int], **settings: Any) -> None:
        super().__init__(prompt, learning_rate, **settings)
        self.users = users

    def accumulate(self, loss: Loss, batch: Batch) -> Iterator[Tensor]:
        ordered = sorted(batch.index, key=lambda row: (self.users[row], row))
        for _, rows in groupby(ordered, key=lambda row: self.users[row]):
            total = torch.zeros_like(self.master, requires_grad=False)  # (l, d)
            for _, value, gradient in self.row_gradients(loss, Batch(batch.encoded, tuple(rows))):
                total += gradient.double()
                yield value
            self.clip_and_accumulate(total[None])
