"""Progress of long work, and the callback that is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Where long work stands. ``metrics`` are the latest values (loss and the like)."""

    step: int
    steps: int
    stage: str
    metrics: Mapping[str, float] = field(default_factory=dict)


def ignore(_: Progress) -> None:
    """The reporter for those who don't want to know."""


ProgressCallback = Callable[[Progress], None]
