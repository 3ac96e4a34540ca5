"""Bootstrap intervals, and how well a score separates members from non-members: ROC curve, AUC, and the true positive
rate at a low false positive rate."""

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
    """Each value of ``statistic(*samples)`` with its percentile interval.

    The rows of each sample are resampled independently of the other samples. Columns of a row stay together, so the
    difference of two models on the same rows is paired.
    """
    generator = np.random.default_rng(seed)

    def resample(sample: Numbers) -> Numbers:
        return sample[generator.integers(len(sample), size=len(sample))]

    values = np.array([statistic(*map(resample, samples)) for _ in range(RESAMPLES)])
    return tuple(map(estimate, np.asarray(statistic(*samples)).tolist(), values.T))


def estimate(value: float, resampled: Numbers, confidence: float = CONFIDENCE) -> Estimate:
    """``value`` with the interval of its resampled values (R,)."""
    low, high = interval(resampled, confidence)
    return Estimate(value=value, low=low, high=high)


def interval(samples: Numbers, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The central ``confidence`` interval of the samples, by percentiles."""
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1.0 - tail])
    return float(low), float(high)


# --- members and non-members --------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Points of a ROC curve from (0, 0) to (1, 1), one per distinct score."""

    false_positives: Numbers
    true_positives: Numbers

    @property
    def auc(self) -> float:
        """Area under the curve: the probability that a member scores above a non-member, ties counted half."""
        return float(np.trapezoid(self.true_positives, self.false_positives))

    def at(self, false_positive_rate: float) -> float:
        """The largest true positive rate at a false positive rate of at most ``false_positive_rate``."""
        last = np.searchsorted(self.false_positives, false_positive_rate * (1 + 1e-12), side="right") - 1
        return float(self.true_positives[last])


class Ranking:
    """Scores sorted once, for curves with many weightings of the rows."""

    def __init__(self, scores: Numbers, members: NDArray[np.bool_]) -> None:
        """Scores (M,) of rows, and which rows are members (M,); at least one is, and one isn't."""
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        self.members = members[self.order]
        self.last_of_tie = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)

    def curve(self, weights: Numbers | None = None) -> Curve:
        """The curve with weights (M,) of the rows, by default 1."""
        ranked = np.ones(len(self.order)) if weights is None else weights[self.order]
        true = np.cumsum(np.where(self.members, ranked, 0.0))[self.last_of_tie]
        false = np.cumsum(np.where(self.members, 0.0, ranked))[self.last_of_tie]
        return Curve(np.append(0.0, false / max(false[-1], 1e-300)), np.append(0.0, true / max(true[-1], 1e-300)))


def curve_of(members: Numbers, others: Numbers) -> Curve:
    """The curve of the scores of members (m,) and of non-members (n,)."""
    is_member = np.arange(len(members) + len(others)) < len(members)
    return Ranking(np.concatenate([members, others]), is_member).curve()


def auc(members: Numbers, others: Numbers) -> float:
    """Probability that a member scores above a non-member, ties counted half. (m,), (n,) -> scalar."""
    return curve_of(members, others).auc
