"""How far long work is, and how large its steps are then."""

from __future__ import annotations

import time
from dataclasses import dataclass

from post_shared.errors import InvalidInput


def warm_then_linear(done: float, warm: float = 0.0) -> float:
    """Factor of the learning rate after the share ``done`` of the work: up to 1 over ``warm``, then down to 0."""
    if done < warm:
        return done / warm
    return max(0.0, (1.0 - done) / (1.0 - warm))


@dataclass
class Clock:
    """Share of the work done, by steps or by time, whichever is further."""

    steps: int | None
    seconds: float | None
    spent: float = 0.0
    step: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise InvalidInput("say how long to train: steps, minutes or both")
        self._since = time.monotonic() - self.spent

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._since

    @property
    def done(self) -> float:
        by_steps = self.step / self.steps if self.steps else 0.0
        by_time = self.elapsed / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    @property
    def expected_steps(self) -> int:
        """The steps in all: known, or projected from the pace so far."""
        if self.done <= 0 or (self.steps and not self.seconds):
            return self.steps or 1
        return max(self.step, round(self.step / self.done))
