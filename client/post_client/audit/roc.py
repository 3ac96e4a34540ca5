"""How well a score tells members from others: ROC curve, AUC, and the share of members found at few false alarms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FALSE_ALARMS = (0.001, 0.01)
"""The false positive rates at which attacks are compared (Carlini et al. 2022)."""


@dataclass(frozen=True)
class Curve:
    """Points of a ROC curve from (0, 0) to (1, 1), one for each different score."""

    false_positives: Floats
    true_positives: Floats

    @property
    def auc(self) -> float:
        """Area under the curve: the chance that a member scores above another row, ties counted half."""
        return float(np.trapezoid(self.true_positives, self.false_positives))

    def at(self, false_alarms: float) -> float:
        """The largest true positive rate whose false positive rate is at most ``false_alarms``."""
        reached = np.searchsorted(self.false_positives, false_alarms * (1 + 1e-12), side="right") - 1
        return float(self.true_positives[reached])


class Ranking:
    """Scores sorted once, for curves under many weightings."""

    def __init__(self, scores: Floats, members: NDArray[np.bool_]) -> None:
        """Scores (M,) of rows, of which some are members; there is at least one of each kind."""
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        self.members = members[self.order]
        self.last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # of each run of ties

    def curve(self, weights: Floats | None = None) -> Curve:
        """The curve with weights (M,) for the rows, by default 1."""
        heavy = np.ones(len(self.order)) if weights is None else weights[self.order]
        hits = np.cumsum(np.where(self.members, heavy, 0.0))[self.last]
        alarms = np.cumsum(np.where(self.members, 0.0, heavy))[self.last]
        return Curve(np.append(0.0, alarms / max(alarms[-1], 1e-300)), np.append(0.0, hits / max(hits[-1], 1e-300)))


@dataclass(frozen=True)
class Estimate:
    """A figure and its confidence interval."""

    value: float
    low: float
    high: float


def interval(samples: Floats, confidence: float) -> tuple[float, float]:
    """The middle ``confidence`` of the samples."""
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1.0 - tail])
    return float(low), float(high)
