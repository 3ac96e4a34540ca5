"""Gaussian noise in float64, drawn from the run's randomness."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from post_client.privacy.randomness import RESOLUTION, Randomness

ADDENDS = 4


def gaussian(randomness: Randomness, shape: tuple[int, ...], deviation: float, step: int) -> NDArray[np.float64]:
    """Independent samples of N(0, deviation²) in ``shape``.

    The gaps between floating-point values of a single Gaussian reveal which sums are impossible (Mironov 2012;
    Holohan & Braghin 2021). As in Opacus's secure mode, each sample is the scaled sum of 2n = 4 Gaussians, which
    raises the cost of that attack from 2^53 to 2^159 trials.
    """
    if deviation == 0:
        return np.zeros(shape)
    samples = _standard(randomness, ADDENDS * prod(shape), step)
    total: NDArray[np.float64] = samples.reshape(ADDENDS, *shape).sum(axis=0) / np.sqrt(ADDENDS)
    return total * deviation


def _standard(randomness: Randomness, count: int, step: int) -> NDArray[np.float64]:
    """``count`` samples of N(0, 1) by the Box–Muller transform: two uniforms give two Gaussians."""
    pairs = (count + 1) // 2
    drawn = randomness.integers(2 * pairs, "noise", step).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((drawn[:pairs] + 1.0) / RESOLUTION))  # the uniform in (0, 1]
    angle = 2.0 * np.pi * (drawn[pairs:] / RESOLUTION)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
