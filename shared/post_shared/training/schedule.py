"""The learning rate schedule, and the clock of a training that is limited by steps, time or both."""

from __future__ import annotations

import time
from dataclasses import dataclass

from post_shared.errors import InvalidInput


def warm_then_linear(done: float, warm: float = 0.0) -> float:
    """Learning rate factor after the share ``done`` of training: linear warm-up to 1 over ``warm``, then down to 0."""
    if done < warm:
        return done / warm
    return max(0.0, (1.0 - done) / (1.0 - warm))


@dataclass
class Clock:
    """How much of the training is done, by steps or by time (seconds), whichever is further."""

    steps: int | None
    seconds: float | None
    spent: float = 0.0
    step: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise InvalidInput("how long to train isn't set: give steps, minutes or both")
        self._start = time.monotonic() - self.spent

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def done(self) -> float:
        by_steps = self.step / self.steps if self.steps else 0.0
        by_time = self.elapsed / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    @property
    def expected_steps(self) -> int:
        """The total number of steps: as given, or extrapolated from the pace so far."""
        if self.done <= 0 or (self.steps and not self.seconds):
            return self.steps or 1
        return max(self.step, round(self.step / self.done))
