"""Figures with their uncertainty, and how well a score tells members from others: ROC curve, AUC, and the share of
members found at few false alarms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from post_shared.schemas.reports import Estimate

RESAMPLES = 1000
CONFIDENCE = 0.95
FALSE_POSITIVE_RATE = 0.01

Numbers = NDArray[np.float64]


def bootstrap(statistic: Callable[..., Any], *samples: Numbers, seed: int = 0) -> tuple[Estimate, ...]:
    """Each number of ``statistic(*samples)`` with its percentile interval.

    Every sample is redrawn by rows, independently of the others. Columns of a sample stay together, so that the
    difference of two models on the same rows is a paired one.
    """
    generator = np.random.default_rng(seed)

    def redrawn(sample: Numbers) -> Numbers:
        return sample[generator.integers(len(sample), size=len(sample))]

    values = np.array([statistic(*map(redrawn, samples)) for _ in range(RESAMPLES)])
    return tuple(map(estimate, np.asarray(statistic(*samples)).tolist(), values.T))


def estimate(value: float, resampled: Numbers, confidence: float = CONFIDENCE) -> Estimate:
    """``value`` with the interval that its resampled values (R,) give."""
    low, high = interval(resampled, confidence)
    return Estimate(value=value, low=low, high=high)


def interval(samples: Numbers, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The middle ``confidence`` of the samples."""
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1.0 - tail])
    return float(low), float(high)


# --- members and others -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Points of a ROC curve from (0, 0) to (1, 1), one for each different score."""

    false_positives: Numbers
    true_positives: Numbers

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

    def __init__(self, scores: Numbers, members: NDArray[np.bool_]) -> None:
        """Scores (M,) of rows, of which some are members; there is at least one of each kind."""
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        self.members = members[self.order]
        self.last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # of each run of ties

    def curve(self, weights: Numbers | None = None) -> Curve:
        """The curve with weights (M,) for the rows, by default 1."""
        heavy = np.ones(len(self.order)) if weights is None else weights[self.order]
        hits = np.cumsum(np.where(self.members, heavy, 0.0))[self.last]
        alarms = np.cumsum(np.where(self.members, 0.0, heavy))[self.last]
        return Curve(np.append(0.0, alarms / max(alarms[-1], 1e-300)), np.append(0.0, hits / max(hits[-1], 1e-300)))


def curve_of(members: Numbers, others: Numbers) -> Curve:
    """The curve of the scores of members (m,) and of others (n,)."""
    is_member = np.arange(len(members) + len(others)) < len(members)
    return Ranking(np.concatenate([members, others]), is_member).curve()


def auc(members: Numbers, others: Numbers) -> float:
    """Probability that a member scores above a non-member, a tie counting half. (m,), (n,) -> scalar."""
    return curve_of(members, others).auc
