"""Writes progress into the job row: often enough to watch, rarely enough not to slow the job down."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sqlalchemy.exc import OperationalError

from post_server.db.database import Database
from post_server.jobs import states
from post_server.jobs.states import Lease

if TYPE_CHECKING:
    from post_shared.training.progress import Progress

log = logging.getLogger("post.job")

SPANS = {
    "corpus": (0.0, 0.01),
    "search": (0.01, 0.05),
    "start": (0.05, 0.08),
    "distil": (0.08, 0.98),
    "student": (0.0, 0.04),
    "precompute": (0.04, 0.25),
    "transfer": (0.25, 0.98),
    "evaluate": (0.0, 0.98),
}
"""The share of the whole job that each stage takes, for one progress bar that doesn't jump."""

_MIN_PAUSE, _MAX_PAUSE = 0.5, 10.0
_PAUSE_SHARE = 1 / 500
"""Of a job's age: older jobs write less often, so that a day leaves thousands of events, not millions."""


class ProgressWriter:
    """A :data:`post_shared.training.progress.ProgressCallback` that writes under the job's lease."""

    def __init__(self, database: Database, lease: Lease, stop_if_interrupted: Callable[[], None]) -> None:
        self._database, self._lease, self._stop_if_interrupted = database, lease, stop_if_interrupted
        self._began, self._last, self._stage, self._step = time.monotonic(), -math.inf, "", 0

    def __call__(self, progress: Progress) -> None:
        """Called at every step.

        Raises:
            Cancelled: the process was interrupted.
            LeaseLost: another worker holds the job now.
        """
        self._stop_if_interrupted()
        now = time.monotonic()
        pause = min(_MAX_PAUSE, max(_MIN_PAUSE, (now - self._began) * _PAUSE_SHARE))
        if progress.stage == self._stage and now - self._last < pause and progress.step < progress.steps:
            return
        step_seconds = self._step_seconds(progress, now)
        self._last, self._stage, self._step = now, progress.stage, progress.step
        low, high = SPANS.get(progress.stage, (0.0, 0.98))
        try:
            with self._database.write() as session:
                states.record_progress(
                    session,
                    self._lease,
                    progress=low + (high - low) * min(1.0, progress.step / max(1, progress.steps)),
                    stage=progress.stage,
                    step=progress.step,
                    steps=progress.steps,
                    metrics=_finite(progress.metrics),
                    step_seconds=step_seconds,
                )
        except OperationalError as error:  # one update less doesn't matter; the lease is checked elsewhere
            log.warning("progress not written: %s", error.orig, extra={"job": self._lease.job_id})

    def _step_seconds(self, progress: Progress, now: float) -> float | None:
        """Seconds per step since the last update; None at the first of a stage."""
        steps = progress.step - self._step
        return (now - self._last) / steps if progress.stage == self._stage and steps > 0 else None


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON has no NaN."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
