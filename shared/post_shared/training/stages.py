"""Long work of several stages: each is done once, and a killed or cancelled job goes on at the stage where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from post_shared.training.progress import Progress, ProgressCallback
from post_shared.training.progress_file import Notes

TICKS = 1000
"""Steps of the whole work, as it is reported."""


class Stages:
    """What finished stages made, as JSON in ``folder``; what another ``work`` made there isn't ours and is ignored.

    ``costs`` names all stages in their order, each with its share of the whole in any unit, for one bar over all.
    """

    def __init__(
        self, costs: Mapping[str, float], on_progress: ProgressCallback, folder: Path | None, run_id: str
    ) -> None:
        self._costs, self._report = costs, on_progress
        self._notes = Notes(folder / "stages.json" if folder else None, run_id)
        made = self._notes.read()
        self._made: dict[str, Any] = made if isinstance(made, dict) else {}

    def once(self, name: str, make: Callable[[ProgressCallback], Any]) -> Any:
        """What ``make(report)`` makes (plain JSON), from the file if it was made before."""
        if name not in self._made:
            made = make(self._within(name))
            self._made[name] = made
            self._notes.write(self._made)
        return self._made[name]

    def _within(self, name: str) -> ProgressCallback:
        """A reporter that turns the progress of a stage into that of the whole."""
        total = sum(self._costs.values())
        before = sum(cost for other, cost in self._costs.items() if other in self._made)

        def tell(progress: Progress) -> None:
            share = min(1.0, progress.step / max(1, progress.steps))
            done = (before + self._costs[name] * share) / total
            self._report(Progress(round(TICKS * done), TICKS, name, progress.metrics))

        return tell
