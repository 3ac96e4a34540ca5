"""Seconds that a piece of work took over all runs that were at it: those of a stopped one are kept beside its files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from post_shared.training.progress import Progress, ProgressCallback

EVERY = 10.0
"""Seconds from one note of the time spent to the next: what a kill can lose."""


class Spent:
    """Seconds spent on what is made at ``path``, over all runs that worked on it."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._kept, self._clock = path.with_name(f"{path.name}.seconds"), clock
        self._before = float(self._kept.read_text("utf-8")) if self._kept.exists() else 0.0
        self._began = self._noted = clock()

    @property
    def seconds(self) -> float:
        return self._before + self._clock() - self._began

    def noting(self, on_progress: ProgressCallback) -> ProgressCallback:
        """As ``report``, and now and then the time is noted."""

        def tell(progress: Progress) -> None:
            if self._clock() - self._noted >= EVERY:
                self._noted = self._clock()
                aside = self._kept.with_name(f"{self._kept.name}.part")
                aside.parent.mkdir(parents=True, exist_ok=True)
                aside.write_text(repr(self.seconds), "utf-8")
                aside.replace(self._kept)
            on_progress(progress)

        return tell

    def over(self) -> float:
        """The seconds in all; there is nothing to go on with any more."""
        self._kept.unlink(missing_ok=True)
        return self.seconds
