"""The step of a transfer that does best on public rows that it isn't trained on.

The provider has no private row to choose a step by, and choosing by a private test set, as the published code does,
breaks the threat model. Public rows that were left out show the same without harm.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from post_shared.data.batches import Batch
from post_shared.training.optimizer import Loss, PromptAdam

LEAST_ROWS = 64
"""Public rows from which on some are left out; of fewer, all are needed for training."""
ONE_IN = 8
MOST_ROWS = 64
EVALUATIONS = 10
"""How often in a transfer the left-out rows are looked at."""


def hold_out(rows: int, seed: int) -> tuple[list[int], list[int]]:
    """(rows to train on, rows left out): one in :data:`ONE_IN`, drawn by the seed; none of less than 64.

    >>> [len(part) for part in hold_out(80, seed=0)]
    [70, 10]
    """
    if rows < LEAST_ROWS:
        return list(range(rows)), []
    order = random.Random(f"held out/{seed}").sample(range(rows), rows)  # noqa: S311  public data
    count = min(rows // ONE_IN, MOST_ROWS)
    return sorted(order[count:]), sorted(order[:count])


class BestStep:
    """Adam on a prompt that also keeps the prompt which, at one of the looks, had the least loss on held-out rows.

    Without held-out rows the last prompt is the chosen one.
    """

    def __init__(self, adam: PromptAdam, loss: Loss, held_out: Batch, *, batch_size: int, steps: int) -> None:
        self.adam, self.prompt = adam, adam.prompt
        self.loss, self.steps = loss, steps
        self.parts = held_out.split(batch_size)
        self.every = -(-steps // EVALUATIONS)
        self.step = 0
        self.first = torch.tensor(torch.nan, dtype=torch.float64)
        """The loss of the first step of all, (); no number before it."""
        self.best: dict[str, Tensor] = {}
        """``prompt`` (l, d), ``loss`` () and ``step`` () of the best look so far."""
        self.latest: dict[str, float] = {}
        """What the last look saw, as metrics."""

    def update(self, loss: Loss, batch: Batch) -> float:
        value = self.adam.update(loss, batch)
        self.step += 1
        if self.first.isnan():
            self.first = torch.tensor(value, dtype=torch.float64)
        if self.parts and (self.step % self.every == 0 or self.step == self.steps):
            self._look()
        return value

    @torch.no_grad()
    def _look(self) -> None:
        seen = torch.cat([self.loss(self.prompt, part).double().cpu() for part in self.parts]).mean()
        self.latest = {"held_out_loss": float(seen)}
        if not self.best or seen < self.best["loss"]:
            self.best = {"prompt": self.prompt.detach().clone(), "loss": seen, "step": torch.tensor(self.step)}

    @property
    def chosen(self) -> tuple[Tensor, int, float | None]:
        """(prompt (l, d), its step, its mean loss on the held-out rows)."""
        if not self.best:
            return self.prompt.detach(), self.step, None
        return self.best["prompt"], int(self.best["step"]), float(self.best["loss"])

    def set_learning_rate(self, learning_rate: float) -> None:
        self.adam.set_learning_rate(learning_rate)

    def state(self) -> dict[str, Tensor]:
        best = {f"best.{name}": value for name, value in self.best.items()}
        return self.adam.state() | best | {"first": self.first, "step": torch.tensor(self.step)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.adam.load_state(tensors)
        self.step, self.first = int(tensors["step"]), tensors.get("first", self.first)
        self.best = {n.removeprefix("best."): value.clone() for n, value in tensors.items() if n.startswith("best.")}
        self.latest = {"held_out_loss": float(self.best["loss"])} if self.best else {}
