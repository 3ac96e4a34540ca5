"""Figures with their uncertainty, and the two figures by which a membership attack is judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from post_shared.report_schemas import Estimate

RESAMPLES = 1000
TAIL = 0.025
"""What is left out on each side of an interval of 95 %."""
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
    low, high = np.quantile(values, [TAIL, 1.0 - TAIL], axis=0)
    found = zip(np.asarray(statistic(*samples)).tolist(), low.tolist(), high.tolist(), strict=True)
    return tuple(Estimate(value=value, low=least, high=most) for value, least, most in found)


def auc(members: Numbers, others: Numbers) -> float:
    """Probability that a member scores above a non-member, a tie counting half. (m,), (n,) -> scalar."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, "left")
    not_above = np.searchsorted(ordered, members, "right")
    return float((below + not_above).mean() / (2 * len(others)))


def true_positive_rate(members: Numbers, others: Numbers, false_positive_rate: float = FALSE_POSITIVE_RATE) -> float:
    """Share of members above the lowest threshold that at most so large a share of non-members is above.

    With fewer than 1 / rate non-members, none may be above. (m,), (n,) -> scalar.
    """
    allowed = math.floor(false_positive_rate * len(others) + 1e-9)
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return float((members > threshold).mean())
