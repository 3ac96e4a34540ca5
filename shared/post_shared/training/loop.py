"""The training loop: tuning, transfer and distillation all run in :func:`run_steps`.

It reports progress, saves checkpoints and resumes from them. To cancel, raise :class:`~post_shared.errors.Cancelled` in
the progress callback: the state is saved first.
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

    ``update`` makes one step and returns its metrics. With a ``checkpoint``, a call with the same run id resumes from
    the saved state.

    Raises:
        InvalidInput: a metric is NaN or infinite, or neither ``steps`` nor ``seconds`` is given.
        Cancelled: raised by ``on_progress``; the state is saved first.
    """
    resumed = checkpoint.load() if checkpoint else None
    clock = Clock(steps, seconds)
    if resumed:
        clock = Clock(steps, seconds, spent=resumed[1], step=resumed[0])
        trained.load_state(resumed[2])
    last_saved = time.monotonic()
    try:
        while clock.done < 1.0 and not converged():
            metrics = update(clock)
            clock.step += 1
            if any(not math.isfinite(value) for value in metrics.values()):
                raise InvalidInput(
                    f"{stage}: {dict(metrics)} at step {clock.step} is not finite; lower the learning rate"
                )
            on_progress(Progress(clock.step, clock.expected_steps, stage, metrics))
            if checkpoint and time.monotonic() - last_saved >= checkpoint.every_seconds:
                checkpoint.try_to_save(clock.step, clock.elapsed, trained.state())
                last_saved = time.monotonic()
    except Cancelled:  # raised by on_progress, so between two steps: the state is consistent
        if checkpoint:
            checkpoint.try_to_save(clock.step, clock.elapsed, trained.state())
        raise
    if checkpoint and checkpoint.keeps_end and (resumed is None or resumed[0] < clock.step):
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
    extra_metrics: Callable[[int], Mapping[str, float]] = lambda step: {},
) -> Tensor:
    """Train a prompt with ``learning_rate`` falling linearly to 0; returns it, (l, d).

    ``batches(step)`` returns the batch of a step, ``extra_metrics(step)`` more metrics to report, such as the ε spent.
    The reported loss is the mean of the last 20 steps.

    Raises:
        As :func:`run_steps`.
    """
    recent: list[float] = []

    def update(clock: Clock) -> dict[str, float]:
        optimizer.set_learning_rate(learning_rate * warm_then_linear(clock.step / steps))
        value = optimizer.update(loss, batches(clock.step))
        if value is not None:  # an empty Poisson batch has no loss
            recent.append(value)
            del recent[:-20]
        mean = {"loss": sum(recent) / len(recent)} if recent else {}
        return mean | dict(extra_metrics(clock.step + 1))

    run_steps(update, optimizer, steps=steps, stage=stage, on_progress=on_progress, checkpoint=checkpoint)
    return optimizer.prompt.detach()
