"""The seconds that a task took in total over interrupted runs, kept in a file beside its output."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from post_shared.training.progress import Progress, ProgressCallback

EVERY = 10.0
"""Seconds between two saves: at most this much is lost when the process is killed."""


class Spent:
    """Seconds spent on the output at ``path``, over all runs."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = path.with_name(f"{path.name}.seconds"), clock
        self._before = float(self._file.read_text("utf-8")) if self._file.exists() else 0.0
        self._began = self._saved = clock()

    @property
    def seconds(self) -> float:
        return self._before + self._clock() - self._began

    def noting(self, on_progress: ProgressCallback) -> ProgressCallback:
        """A progress callback that also saves the time spent, every :data:`EVERY` seconds."""

        def save_and_report(progress: Progress) -> None:
            if self._clock() - self._saved >= EVERY:
                self._saved = self._clock()
                temporary = self._file.with_name(f"{self._file.name}.part")
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(repr(self.seconds), "utf-8")
                temporary.replace(self._file)
            on_progress(progress)

        return save_and_report

    def over(self) -> float:
        """The total seconds of the finished task; the file is removed."""
        self._file.unlink(missing_ok=True)
        return self.seconds
