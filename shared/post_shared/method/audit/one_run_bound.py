"""Auditing in one run (Steinke, Nasr & Jagielski 2023): right guesses about canaries bound ε from below.

Each of m canaries is put into the data with probability 1/2, by a coin of its own. One run is made, and an auditor
guesses for some of the canaries whether they were in. If the run is (ε, δ)-differentially private, every guess is
right with probability at most about e^ε / (1 + e^ε): more right guesses than that allows speak against ε.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import binom

from post_shared.errors import InvalidInput

CONFIDENCE = 0.95
SHARES = ((1 / 2, 1 / 2), (1 / 8, 1 / 8), (1 / 32, 1 / 32), (1 / 128, 1 / 128), (1 / 512, 1 / 512), (1 / 8, 0.0))
"""Shares of the canaries guessed to be in and out, fixed before any score is seen. Many guesses serve when canaries
are told apart well, a few sure ones when they aren't; each choice has to pass at a stricter level, for all it is
tried along with."""
GRID = 0.1
LARGEST = 20.0


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The largest probability of ``right`` or more right guesses under any (ε, δ)-private run (their Theorem 5.2).

    With W ~ Binomial(r, e^ε / (1 + e^ε)) it is β + α m δ, where β = P[W >= v] and
    α = max over i of (2 / i) P[v > W >= v - i].
    """
    _check_counts(canaries, guesses, right, delta)
    chance = expit(epsilon)
    beta = float(binom.sf(right - 1, guesses, chance))
    if right == 0:
        return 1.0
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))  # P[v > W >= v - i] for i = 1 ... v
    alpha = float((2.0 / np.arange(1, right + 1) * below).max())
    return min(1.0, beta + alpha * canaries * delta)


def _check_counts(canaries: int, guesses: int, right: int, delta: float) -> None:
    if not 0 <= right <= guesses <= canaries:
        raise InvalidInput(f"{right} of {guesses} guesses right, about {canaries} canaries: that can't be")
    if not 0 <= delta < 1:
        raise InvalidInput(f"delta is {delta}; it must lie between 0 and 1")


@lru_cache(maxsize=4096)
def epsilon_lower_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest ε that so many right guesses refute: with this confidence the run's ε at ``delta`` is no less.

    0 where nothing is refuted. Every smaller ε on a grid is refuted too, so a p-value that isn't monotone in ε does
    no harm.
    """
    allowed = 1.0 - confidence
    refuted = 0.0
    if p_value(canaries, guesses, right, 0.0, delta) >= allowed:
        return 0.0
    while p_value(canaries, guesses, right, refuted + GRID, delta) < allowed:
        refuted += GRID
        if refuted > LARGEST:
            return refuted
    low, high = refuted, refuted + GRID
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(canaries, guesses, right, middle, delta) < allowed else (low, middle)
    return low


@dataclass(frozen=True)
class Evidence:
    """What guesses about canaries prove: with ``confidence``, the run's ε at ``delta`` is at least ``epsilon``."""

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    right: int


def evidence(
    scores: NDArray[np.float64], included: NDArray[np.bool_], delta: float, confidence: float = CONFIDENCE
) -> Evidence:
    """The best bound that guessing by ``scores`` (m,) gives: the highest are guessed in, the lowest out.

    All :data:`SHARES` are tried, each at the level that keeps ``confidence`` for the best of them.
    """
    count = len(scores)
    if count < 1 or scores.shape != included.shape:
        raise InvalidInput(f"{scores.shape} scores for {included.shape} canaries; one each, and at least one")
    ranked = included[np.argsort(-scores, kind="stable")]
    level = 1.0 - (1.0 - confidence) / len(SHARES)
    found = []
    for share_in, share_out in SHARES:
        guess_in, guess_out = round(share_in * count), int(share_out * count)
        guess_in = min(guess_in, count - guess_out)
        right = int(ranked[:guess_in].sum() + (~ranked[count - guess_out :]).sum())
        bound = epsilon_lower_bound(count, guess_in + guess_out, right, delta, level)
        found.append(Evidence(bound, delta, confidence, count, guess_in + guess_out, right))
    return max(found, key=lambda each: each.epsilon)


def strongest(canaries: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The bound when every canary is guessed right: so many canaries can show no larger ε, however bad the run."""
    every = np.arange(canaries) % 2 == 0
    return evidence(every.astype(float), every, delta, confidence).epsilon
