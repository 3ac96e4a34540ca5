"""Model selection of a transfer: the step with the lowest loss on public rows that were held out of training.

The provider has no private rows to choose a step by, and choosing it on a private test set, as the published code
does, breaks the threat model. Held-out public rows serve the same purpose without harm.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from post_shared.data.batches import Batch
from post_shared.training.optimizer import Loss, PromptAdam

MIN_ROWS = 64
"""With fewer public rows, all are needed for training and none is held out."""
HELD_OUT_ONE_IN = 8
MAX_HELD_OUT = 64
EVALUATIONS = 10
"""Evaluations on the held-out rows during a transfer."""


def hold_out(rows: int, seed: int) -> tuple[list[int], list[int]]:
    """(rows to train on, rows held out): one in :data:`HELD_OUT_ONE_IN`, drawn with the seed; none of fewer than 64.

    >>> [len(part) for part in hold_out(80, seed=0)]
    [70, 10]
    """
    if rows < MIN_ROWS:
        return list(range(rows)), []
    order = random.Random(f"held out/{seed}").sample(range(rows), rows)  # noqa: S311  public data
    count = min(rows // HELD_OUT_ONE_IN, MAX_HELD_OUT)
    return sorted(order[count:]), sorted(order[:count])


class BestStep:
    """Adam on a prompt, which also evaluates the prompt on held-out rows and keeps the one with the lowest loss.

    Without held-out rows the last prompt is chosen.
    """

    def __init__(self, adam: PromptAdam, loss: Loss, held_out: Batch, *, batch_size: int, steps: int) -> None:
        self.adam, self.prompt = adam, adam.prompt
        self.loss, self.steps = loss, steps
        self.held_out = held_out.split(batch_size)
        self.interval = -(-steps // EVALUATIONS)
        self.step = 0
        self.first_loss = torch.tensor(torch.nan, dtype=torch.float64)
        """Training loss of the first step, (); NaN before it."""
        self.best: dict[str, Tensor] = {}
        """``prompt`` (l, d), ``loss`` () and ``step`` () of the best evaluation so far."""
        self.latest: dict[str, float] = {}
        """Metrics of the last evaluation."""

    def update(self, loss: Loss, batch: Batch) -> float:
        value = self.adam.update(loss, batch)
        self.step += 1
        if self.first_loss.isnan():
            self.first_loss = torch.tensor(value, dtype=torch.float64)
        if self.held_out and (self.step % self.interval == 0 or self.step == self.steps):
            self._evaluate()
        return value

    @torch.no_grad()
    def _evaluate(self) -> None:
        loss = torch.cat([self.loss(self.prompt, batch).double().cpu() for batch in self.held_out]).mean()
        self.latest = {"held_out_loss": float(loss)}
        if not self.best or loss < self.best["loss"]:
            self.best = {"prompt": self.prompt.detach().clone(), "loss": loss, "step": torch.tensor(self.step)}

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
        return self.adam.state() | best | {"first": self.first_loss, "step": torch.tensor(self.step)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.adam.load_state(tensors)
        self.step, self.first_loss = int(tensors["step"]), tensors.get("first", self.first_loss)
        self.best = {n.removeprefix("best."): value.clone() for n, value in tensors.items() if n.startswith("best.")}
        self.latest = {"held_out_loss": float(self.best["loss"])} if self.best else {}
