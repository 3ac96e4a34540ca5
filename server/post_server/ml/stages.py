"""Long work of several stages: each is done once, and a killed or cancelled job goes on at the stage where it was."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from post_shared.training import Progress, Reporter

log = logging.getLogger("post.job")

TICKS = 1000
"""Steps of the whole work, as it is reported."""


class Stages:
    """What finished stages made, as JSON in ``folder``; what another ``work`` made there isn't ours and is ignored.

    ``costs`` names all stages in their order, each with its share of the whole in any unit, for one bar over all.
    """

    def __init__(self, costs: Mapping[str, float], report: Reporter, folder: Path | None, work: str) -> None:
        self._costs, self._report, self._work = costs, report, work
        self._path = folder / "stages.json" if folder else None
        self._made: dict[str, Any] = self._read()

    def once(self, name: str, make: Callable[[Reporter], Any]) -> Any:
        """What ``make(report)`` makes (plain JSON), from the file if it was made before."""
        if name not in self._made:
            made = make(self._within(name))
            self._made[name] = made
            self._keep()
        return self._made[name]

    def _within(self, name: str) -> Reporter:
        """A reporter that turns the progress of a stage into that of the whole."""
        total = sum(self._costs.values())
        before = sum(cost for other, cost in self._costs.items() if other in self._made)

        def tell(progress: Progress) -> None:
            share = min(1.0, progress.step / max(1, progress.steps))
            done = (before + self._costs[name] * share) / total
            self._report(Progress(round(TICKS * done), TICKS, name, progress.metrics))

        return tell

    def _read(self) -> dict[str, Any]:
        try:
            document = json.loads(self._path.read_text("utf-8")) if self._path else {}
            return dict(document["made"]) if document.get("work") == self._work else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _keep(self) -> None:
        """Written aside and renamed. A full disk ends no work: the log says so, and a restart repeats the stage."""
        if self._path is None:
            return
        aside = self._path.with_suffix(f".{os.getpid()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("w", encoding="utf-8") as file:
                json.dump({"work": self._work, "made": self._made}, file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self._path)
        except OSError as error:
            log.warning("no stage kept: %s", error)
        finally:
            aside.unlink(missing_ok=True)
