"""The one training loop: tuning, transfer and distillation all run in :func:`run_steps`.

It reports progress, keeps checkpoints (safetensors with a JSON header, replaced atomically) and resumes from
them. Cancelling is raising :class:`~post_shared.errors.Cancelled` from the reporter: the state is kept first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from post_shared.batches import Batch
from post_shared.clock import Clock, warm_then_linear
from post_shared.errors import Cancelled, InvalidInput
from post_shared.offload import weights_of

log = logging.getLogger("post.training")


@dataclass(frozen=True)
class Progress:
    """Where long work stands. ``metrics`` are the latest values (loss and the like)."""

    step: int
    steps: int
    stage: str
    metrics: Mapping[str, float] = field(default_factory=dict)


Reporter = Callable[[Progress], None]
Loss = Callable[[Tensor, Batch], Tensor]
"""``loss(prompt, batch) -> (B,)``: one value per row; the prompt is (l, d) or (B, l, d)."""
Split = Callable[[Batch], list[Batch]]
"""Cuts a batch into what runs at a time."""


def ignore(_: Progress) -> None:
    """The reporter for those who don't want to know."""


# --- what is trained ----------------------------------------------------------------------------------


class Trainable(Protocol):
    """Anything with weights and an optimizer whose state can be kept as tensors."""

    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, tensors: Mapping[str, Tensor]) -> None: ...


@runtime_checkable
class Settles(Protocol):
    """A loss that keeps something to go back through once, after all parts of a step."""

    def settle(self) -> None: ...


class PromptOptimizer(Trainable, Protocol):
    """Moves a prompt by one step on one batch: plainly (:class:`PromptAdam`) or with differential privacy."""

    prompt: nn.Parameter

    def update(self, loss: Loss, batch: Batch) -> float | None: ...
    def set_learning_rate(self, learning_rate: float) -> None: ...


def whole(batch: Batch) -> list[Batch]:
    """One pass for all rows."""
    return [batch]


class PromptAdam:
    """Adam on a prompt (l, d) and on nothing else, with the mean of the rows' losses.

    ``split`` cuts a batch into what runs at a time: memory depends on it, the result doesn't.
    """

    def __init__(self, prompt: nn.Parameter, learning_rate: float, split: Split = whole) -> None:
        self.prompt, self.split = prompt, split
        self.optimizer = torch.optim.Adam([prompt], lr=learning_rate)

    def update(self, loss: Loss, batch: Batch) -> float:
        self.optimizer.zero_grad()
        total, count = 0.0, 0
        for part in self.split(batch):
            losses = loss(self.prompt, part)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            total, count = total + float(losses.detach().sum()), count + len(losses)
        if isinstance(loss, Settles):
            loss.settle()
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
    return {f"optimizer.{at}.{name}": torch.as_tensor(value) for at, some in entries for name, value in some.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of :func:`optimizer_state`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, at, entry = name.split(".", 2)
            state.setdefault(int(at), {})[entry] = value.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# --- checkpoints --------------------------------------------------------------------------------------


def fingerprint(*parts: Any) -> str:
    """A short name for "the same work": equal for equal configurations, texts and tensors."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        elif isinstance(part, nn.Module):  # a taste of each weight tells models apart; all of them take minutes
            tastes = [weight.flatten()[:256] for weight in weights_of(part)]
            digest.update(fingerprint(*tastes, [str(taste.dtype) for taste in tastes]).encode())
        else:
            plain = asdict(part) if is_dataclass(part) and not isinstance(part, type) else part
            digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """One resumable state in ``folder``; a state with another ``work`` fingerprint is not ours and is ignored."""

    folder: Path
    work: str
    every_seconds: float = 60.0
    writes: bool = True
    """False for those that only read what another process keeps."""

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def save(self, step: int, seconds: float, tensors: Mapping[str, Tensor]) -> None:
        """Written aside, flushed, then renamed: a kill at any moment leaves the old state or the new one."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f"checkpoint.{os.getpid()}.part"
        header = {"work": self.work, "step": str(step), "seconds": repr(seconds)}
        try:
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, aside, header)
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            aside.replace(self.path)
        finally:
            aside.unlink(missing_ok=True)

    def try_to_save(self, step: int, seconds: float, tensors: Mapping[str, Tensor]) -> None:
        """As :meth:`save`, but a full disk ends no work: what was kept before stays, and the log says so."""
        try:
            self.save(step, seconds, tensors)
        except (OSError, SafetensorError) as error:
            log.warning("no checkpoint kept at step %d: %s", step, error)

    def load(self) -> tuple[int, float, dict[str, Tensor]] | None:
        """(steps done, seconds spent, tensors), or None where there is nothing to go on from."""
        if not self.begun():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                return int(header["step"]), float(header["seconds"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def begun(self) -> bool:
        """Whether there is a state of this work to go on from."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return (file.metadata() or {}).get("work") == self.work
        except (OSError, SafetensorError):
            return False


# --- the loop -----------------------------------------------------------------------------------------


def run_steps(
    update: Callable[[Clock], Mapping[str, float]],
    trained: Trainable,
    *,
    steps: int | None,
    seconds: float | None = None,
    stage: str,
    report: Reporter = ignore,
    checkpoint: Checkpoint | None = None,
    converged: Callable[[], bool] = lambda: False,
) -> int:
    """Call ``update(clock)`` until the steps or the time are used up; returns the steps done.

    ``update`` makes one step and returns its metrics. A reporter that raises stops the work; with a
    ``checkpoint`` nothing is lost, and the next call with the same fingerprint goes on from there.
    """
    found = checkpoint.load() if checkpoint else None
    clock = Clock(steps, seconds)
    if found:
        clock = Clock(steps, seconds, spent=found[1], step=found[0])
        trained.load_state(found[2])
    saved = time.monotonic()
    try:
        while clock.done < 1.0 and not converged():
            metrics = update(clock)
            clock.step += 1
            if any(not math.isfinite(value) for value in metrics.values()):
                raise InvalidInput(
                    f"{stage}: {dict(metrics)} at step {clock.step} is not finite; lower the learning rate"
                )
            report(Progress(clock.step, clock.expected_steps, stage, metrics))
            if checkpoint and time.monotonic() - saved >= checkpoint.every_seconds:
                checkpoint.try_to_save(clock.step, clock.elapsed, trained.state())
                saved = time.monotonic()
    except Cancelled:  # raised by the reporter, so between two steps: the state is whole
        if checkpoint:
            checkpoint.try_to_save(clock.step, clock.elapsed, trained.state())
        raise
    return clock.step


def train_prompt(
    optimizer: PromptOptimizer,
    loss: Loss,
    batches: Callable[[int], Batch],
    *,
    steps: int,
    learning_rate: float,
    stage: str,
    report: Reporter = ignore,
    checkpoint: Checkpoint | None = None,
    also: Callable[[int], Mapping[str, float]] = lambda step: {},
) -> Tensor:
    """Train a prompt with ``learning_rate`` falling linearly to 0; returns it, (l, d).

    ``batches(step)`` gives the batch of a step; ``also(step)`` further metrics to report, such as ε spent.
    """
    smooth: list[float] = []

    def update(clock: Clock) -> dict[str, float]:
        optimizer.set_learning_rate(learning_rate * warm_then_linear(clock.step / steps))
        value = optimizer.update(loss, batches(clock.step))
        if value is not None:  # an empty Poisson batch has no loss
            smooth.append(value)
            del smooth[:-20]
        mean = {"loss": sum(smooth) / len(smooth)} if smooth else {}
        return mean | dict(also(clock.step + 1))

    run_steps(update, optimizer, steps=steps, stage=stage, report=report, checkpoint=checkpoint)
    return optimizer.prompt.detach()
