"""A job of several stages: each is run once, and a killed or cancelled job resumes at the stage where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from post_shared.training.progress import Progress, ProgressCallback
from post_shared.training.progress_file import ProgressFile

TICKS = 1000
"""Steps of the whole job in its progress."""


class Stages:
    """The results of finished stages, as JSON in ``folder``; results of a run with another ``run_id`` are ignored.

    ``costs`` names all stages in order, each with its cost in any unit, for one progress bar over all.
    """

    def __init__(
        self, costs: Mapping[str, float], on_progress: ProgressCallback, folder: Path | None, run_id: str
    ) -> None:
        self._costs, self._on_progress = costs, on_progress
        self._file = ProgressFile(folder / "stages.json" if folder else None, run_id)
        saved = self._file.read()
        self._results: dict[str, Any] = saved if isinstance(saved, dict) else {}

    def once(self, name: str, run: Callable[[ProgressCallback], Any]) -> Any:
        """The result (plain JSON) of stage ``name``: ``run(on_progress)``, or the saved one."""
        if name not in self._results:
            result = run(self._progress_of(name))
            self._results[name] = result
            self._file.write(self._results)
        return self._results[name]

    def _progress_of(self, name: str) -> ProgressCallback:
        """A callback that converts the progress of a stage to that of the whole job."""
        total = sum(self._costs.values())
        before = sum(cost for stage, cost in self._costs.items() if stage in self._results)

        def on_progress(progress: Progress) -> None:
            share = min(1.0, progress.step / max(1, progress.steps))
            done = (before + self._costs[name] * share) / total
            self._on_progress(Progress(round(TICKS * done), TICKS, name, progress.metrics))

        return on_progress
