"""The average of a prompt's iterates instead of the last one: less noise where the steps are noisy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from post_shared.data.batches import Batch
from post_shared.training.optimizer import Loss, PromptOptimizer


class Averaged:
    """An optimizer that also sums its iterates from step ``since`` on; :attr:`average` is their mean (l, d).

    All iterates have equal weight, whatever their loss. With differential privacy the average is free: the accountant
    counts every iterate as published. Choosing the best one by a private score would not be free.
    """

    def __init__(self, optimizer: PromptOptimizer, since: int) -> None:
        self.optimizer, self.since = optimizer, since
        self.prompt: nn.Parameter = optimizer.prompt
        self.total = torch.zeros_like(optimizer.prompt, dtype=torch.float64, requires_grad=False)
        self.done = 0

    @property
    def average(self) -> Tensor:
        return (self.total / max(1, self.done - self.since)).to(self.prompt.dtype)

    def update(self, loss: Loss, batch: Batch) -> float | None:
        value = self.optimizer.update(loss, batch)
        if self.done >= self.since:
            self.total += self.prompt.detach()
        self.done += 1
        return value

    def set_learning_rate(self, learning_rate: float) -> None:
        self.optimizer.set_learning_rate(learning_rate)

    def state(self) -> dict[str, Tensor]:
        return self.optimizer.state() | {"average.total": self.total, "average.done": torch.tensor(self.done)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        self.optimizer.load_state(tensors)
        self.total.copy_(tensors["average.total"])
        self.done = int(tensors["average.done"])
