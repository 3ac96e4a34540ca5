"""The one training loop: tuning, transfer and distillation all run in :func:`run_steps`.

It reports progress, keeps checkpoints (safetensors with a JSON header, replaced atomically) and resumes from
them. Cancelling is raising :class:`~post_shared.errors.Cancelled` from the reporter: the state is kept first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from torch import Tensor

from post_shared.data.batches import Batch
from post_shared.errors import Cancelled, InvalidInput
from post_shared.training.checkpoint import Checkpoint
from post_shared.training.optimizer import Loss, PromptOptimizer, Trainable
from post_shared.training.progress import Progress, ProgressCallback, ignore
from post_shared.training.schedule import Clock, warm_then_linear

# --- what is trained ----------------------------------------------------------------------------------


# --- checkpoints --------------------------------------------------------------------------------------


# --- the loop -----------------------------------------------------------------------------------------


def run_steps(
    update: Callable[[Clock], Mapping[str, float]],
    trained: Trainable,
    *,
    steps: int | None,
    seconds: float | None = None,
    stage: str,
    on_progress: ProgressCallback = ignore,
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
            on_progress(Progress(clock.step, clock.expected_steps, stage, metrics))
            if checkpoint and time.monotonic() - saved >= checkpoint.every_seconds:
                checkpoint.try_to_save(clock.step, clock.elapsed, trained.state())
                saved = time.monotonic()
    except Cancelled:  # raised by the reporter, so between two steps: the state is whole
        if checkpoint:
            checkpoint.try_to_save(clock.step, clock.elapsed, trained.state())
        raise
    if checkpoint and checkpoint.keeps_end and (found is None or found[0] < clock.step):
        checkpoint.try_to_save(clock.step, clock.elapsed, trained.state())
    return clock.step


def train_prompt(
    optimizer: PromptOptimizer,
    loss: Loss,
    batches: Callable[[int], Batch],
    *,
    steps: int,
    learning_rate: float,
    stage: str,
    on_progress: ProgressCallback = ignore,
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

    run_steps(update, optimizer, steps=steps, stage=stage, on_progress=on_progress, checkpoint=checkpoint)
    return optimizer.prompt.detach()
