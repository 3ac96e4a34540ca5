"""The progress of a job, and the callback that receives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """``step`` of ``steps`` in ``stage``; ``metrics`` are the latest values (loss and the like)."""

    step: int
    steps: int
    stage: str
    metrics: Mapping[str, float] = field(default_factory=dict)


def ignore(_: Progress) -> None:
    """A callback that does nothing."""


ProgressCallback = Callable[[Progress], None]
