"""The protocols of what is trained, and Adam on a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from post_shared.data.batches import Batch

Loss = Callable[[Tensor, Batch], Tensor]
"""``loss(prompt, batch) -> (B,)``: one value per row; the prompt is (l, d) or, one for each row, (B, l, d)."""

Split = Callable[[Batch], list[Batch]]
"""Splits a batch into micro-batches."""


class Trainable(Protocol):
    """Weights and an optimizer whose state can be saved as tensors."""

    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, tensors: Mapping[str, Tensor]) -> None: ...


@runtime_checkable
class HasBackward(Protocol):
    """A loss with a backward pass of its own, run once after all micro-batches of a step."""

    def backward(self) -> None: ...


class PromptOptimizer(Trainable, Protocol):
    """Makes one step of a prompt on one batch: without (:class:`PromptAdam`) or with differential privacy."""

    prompt: nn.Parameter

    def update(self, loss: Loss, batch: Batch) -> float | None: ...
    def set_learning_rate(self, learning_rate: float) -> None: ...


def unsplit(batch: Batch) -> list[Batch]:
    """One micro-batch of all rows."""
    return [batch]


class PromptAdam:
    """Adam on a prompt (l, d) and on nothing else, with the mean of the rows' losses.

    ``split`` makes the micro-batches: memory depends on them, the result doesn't.
    """

    def __init__(self, prompt: nn.Parameter, learning_rate: float, split: Split = unsplit) -> None:
        self.prompt, self.split = prompt, split
        self.optimizer = torch.optim.Adam([prompt], lr=learning_rate)

    def update(self, loss: Loss, batch: Batch) -> float:
        self.optimizer.zero_grad()
        total, count = 0.0, 0
        for part in self.split(batch):
            losses = loss(self.prompt, part)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            total, count = total + float(losses.detach().sum()), count + len(losses)
        if isinstance(loss, HasBackward):
            loss.backward()
        if self.prompt.grad is not None:
            self.prompt.grad /= count
        self.optimizer.step()
        return total / count

    def set_learning_rate(self, learning_rate: float) -> None:
        set_learning_rate(self.optimizer, learning_rate)

    def state(self) -> dict[str, Tensor]:
        return {"prompt": self.prompt.detach()} | optimizer_state(self.optimizer)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.prompt.copy_(tensors["prompt"])
        load_optimizer_state(self.optimizer, tensors)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: ``optimizer.<parameter>.<entry>``."""
    entries = optimizer.state_dict()["state"].items()
    return {f"optimizer.{i}.{name}": torch.as_tensor(value) for i, entry in entries for name, value in entry.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`optimizer_state`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".", 2)
            state.setdefault(int(index), {})[entry] = value.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
