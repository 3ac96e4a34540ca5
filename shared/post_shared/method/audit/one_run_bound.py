"""Auditing in one run (Steinke, Nasr & Jagielski 2023): correct guesses about canaries bound ε from below.

Each of m canaries is included in the data independently with probability 1/2. After one run, an auditor guesses for
some of the canaries whether they were included. If the run is (ε, δ)-differentially private, each guess is correct with
probability at most about e^ε / (1 + e^ε); more correct guesses than that are evidence against ε.
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
"""Shares of the canaries guessed as (included, excluded), fixed before any score is seen. Many guesses are better when
the scores separate canaries well, a few confident ones when they don't. As all are tried, each is tested at a stricter
level (Bonferroni)."""
EPSILON_STEP = 0.1
MAX_EPSILON = 20.0


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The largest probability of at least ``right`` correct guesses under any (ε, δ)-private run (their Theorem 5.2).

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
        raise InvalidInput(f"impossible counts: {right} of {guesses} guesses correct about {canaries} canaries")
    if not 0 <= delta < 1:
        raise InvalidInput(f"delta is {delta}; it must lie between 0 and 1")


@lru_cache(maxsize=4096)
def epsilon_lower_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest ε refuted by ``right`` correct guesses: with ``confidence``, the run's ε at ``delta`` is no smaller.

    0 if nothing is refuted. All smaller ε on a grid are refuted too, so the p-value needn't be monotone in ε.
    """
    level = 1.0 - confidence
    refuted = 0.0
    if p_value(canaries, guesses, right, 0.0, delta) >= level:
        return 0.0
    while p_value(canaries, guesses, right, refuted + EPSILON_STEP, delta) < level:
        refuted += EPSILON_STEP
        if refuted > MAX_EPSILON:
            return refuted
    low, high = refuted, refuted + EPSILON_STEP
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(canaries, guesses, right, middle, delta) < level else (low, middle)
    return low


@dataclass(frozen=True)
class Evidence:
    """A lower bound from guesses about canaries: with ``confidence``, the run's ε at ``delta`` is >= ``epsilon``."""

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    right: int


def evidence(
    scores: NDArray[np.float64], included: NDArray[np.bool_], delta: float, confidence: float = CONFIDENCE
) -> Evidence:
    """The best lower bound from ``scores`` (m,): the highest are guessed as included, the lowest as excluded.

    All :data:`SHARES` are tried, each at a level such that the best of them holds with ``confidence``.

    Raises:
        InvalidInput: no canary, or not one score per canary.
    """
    count = len(scores)
    if count < 1 or scores.shape != included.shape:
        raise InvalidInput(f"{scores.shape} scores for {included.shape} canaries; give one score for each")
    ranked = included[np.argsort(-scores, kind="stable")]
    level = 1.0 - (1.0 - confidence) / len(SHARES)
    candidates = []
    for share_in, share_out in SHARES:
        guess_in, guess_out = round(share_in * count), int(share_out * count)
        guess_in = min(guess_in, count - guess_out)
        right = int(ranked[:guess_in].sum() + (~ranked[count - guess_out :]).sum())
        bound = epsilon_lower_bound(count, guess_in + guess_out, right, delta, level)
        candidates.append(Evidence(bound, delta, confidence, count, guess_in + guess_out, right))
    return max(candidates, key=lambda candidate: candidate.epsilon)


def strongest(canaries: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The bound if every guess is correct: the largest that this number of canaries can show, for any run."""
    included = np.arange(canaries) % 2 == 0
    return evidence(included.astype(float), included, delta, confidence).epsilon
