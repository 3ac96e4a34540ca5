"""ε for given noise and steps, noise for a given ε, and the rules for δ.

The mechanism is the Poisson-subsampled Gaussian mechanism, composed over a fixed number of steps. Neighbouring data
sets differ by one row, added or removed. Opacus's PRV accountant (Gopi et al. 2021) bounds ε from above to within
half a percent; where it fails numerically, Opacus's RDP accountant is used, with a larger ε.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis import rdp as renyi

from post_shared.errors import PrivacyInvalid

Unit = Literal["row", "user"]
"""What is added or removed between neighbouring data sets: one row, or all rows of one user."""


ORDERS = (
    [1.1, 1.25, 1.5, 1.75, 2.25, 2.5, 2.75, 3.5, 4.5]
    + [float(x) for x in range(2, 64)]
    + [2.0**x for x in range(6, 13)]
)
MAX_NOISE = 1e5
DEFAULT_DELTA, DEFAULT_DELTA_EXAMPLES = 1e-6, 100_000
"""δ unless the owner names one, and the number of rows (or users) up to which it is at most 1 / (10 N)."""
PRV_LIMIT = 100.0
"""Above this ε (by RDP) nothing is protected, and PRV would need gigabytes for a tighter bound."""

MIN_PRV_DELTA = 1e-11
"""Below this δ, rounding in PRV's convolutions matters: at 1e-14 its ε is below the true one."""


@dataclass(frozen=True)
class Mechanism:
    """``steps`` steps of the Poisson-subsampled Gaussian mechanism: noise σ, sampling rate q."""

    noise_multiplier: float
    rate: float
    steps: int


@dataclass(frozen=True)
class Spending:
    """An upper bound on ε, and the accountant that proved it."""

    epsilon: float
    accountant: Literal["PRV", "RDP"]


# --- delta --------------------------------------------------------------------------------------------


def default_delta(examples: int) -> float:
    """:data:`DEFAULT_DELTA`, at most 1 / (10 N). It is one number, since δ leaves with the prompt: a default that
    followed N would tell N.

    Raises:
        PrivacyInvalid: there are more rows than that; the owner must name δ.
    """
    _check_examples(examples)
    if examples > DEFAULT_DELTA_EXAMPLES:
        raise PrivacyInvalid(
            f"{examples} rows (or users) are too many for the default delta of {DEFAULT_DELTA:g}; name one below "
            f"1/{examples} (--delta). It leaves with the prompt, so take one that doesn't follow from the number of "
            "rows, such as 1e-9"
        )
    return DEFAULT_DELTA


def check_delta(delta: float, examples: int) -> float:
    """``delta``, if it gives a guarantee.

    Raises:
        PrivacyInvalid: it isn't above 0, or it is 1/N or more: publishing one random row would already satisfy it.
    """
    _check_examples(examples)
    if not 0 < delta < 1:
        raise PrivacyInvalid(f"delta is {delta}; it must lie above 0 and below 1 / (number of rows or users)")
    if delta >= 1 / examples:
        raise PrivacyInvalid(
            f"delta = {delta} is not below 1/{examples}: with it, publishing a whole row would count as private; "
            f"use {min(DEFAULT_DELTA, 0.1 / examples):.0e} or less"
        )
    return delta


def check_epsilon(epsilon: float) -> float:
    """``epsilon``, if it is a finite number above 0.

    Raises:
        PrivacyInvalid: it isn't.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyInvalid(
            f"epsilon is {epsilon}; it must be a finite number above 0 (8 is common, 1 is strong). "
            "To tune without differential privacy, request that explicitly"
        )
    return epsilon


def _check_examples(examples: int) -> None:
    if examples < 1:
        raise PrivacyInvalid(f"differential privacy needs at least one row (or user), not {examples}")


def _check_mechanism(delta: float, rate: float, steps: int) -> None:
    if not 0 < delta < 1:
        raise PrivacyInvalid(f"delta is {delta}; it must lie between 0 and 1")
    if not 0 < rate <= 1:
        raise PrivacyInvalid(f"the sampling rate is {rate}; it must be above 0 and at most 1")
    if steps < 1:
        raise PrivacyInvalid(f"there must be at least one step, not {steps}")


# --- epsilon and noise --------------------------------------------------------------------------------


def epsilon_for(noise_multiplier: float, delta: float, rate: float, steps: int) -> Spending:
    """The ε of ``steps`` steps with noise multiplier σ at ``delta``; see :func:`compose`."""
    return compose([Mechanism(noise_multiplier, rate, steps)], delta)


def compose(mechanisms: Sequence[Mechanism], delta: float) -> Spending:
    """The ε of all ``mechanisms`` on the same data together at ``delta``; far less than the sum of their ε.

    Raises:
        PrivacyInvalid: there is no mechanism, the noise isn't above 0, or another number is out of range.
    """
    steps: dict[tuple[float, float], int] = {}
    for mechanism in mechanisms:
        _check_mechanism(delta, mechanism.rate, mechanism.steps)
        noise_multiplier = mechanism.noise_multiplier
        if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
            raise PrivacyInvalid(f"the noise multiplier is {noise_multiplier}; without noise there is no guarantee")
        kind = float(noise_multiplier), float(mechanism.rate)
        steps[kind] = steps.get(kind, 0) + int(mechanism.steps)
    if not steps:
        raise PrivacyInvalid("there is no mechanism to account for")
    return _compose(tuple(sorted((noise, rate, count) for (noise, rate), count in steps.items())), float(delta))


@lru_cache(maxsize=4096)
def _compose(history: tuple[tuple[float, float, int], ...], delta: float) -> Spending:
    per_order = sum(_renyi(noise, rate) * count for noise, rate, count in history)
    by_rdp = _from_renyi(np.asarray(per_order), delta)
    if by_rdp > PRV_LIMIT or delta < MIN_PRV_DELTA:
        return Spending(by_rdp, "RDP")
    try:
        by_prv = _by_prv(history, delta)
    except (ArithmeticError, ValueError, RuntimeError, AssertionError, IndexError, MemoryError):
        return Spending(by_rdp, "RDP")
    return Spending(by_prv, "PRV") if math.isfinite(by_prv) and by_prv > 0 else Spending(by_rdp, "RDP")


def _by_prv(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        epsilon, error = math.inf, 0.01
        while True:
            epsilon = min(epsilon, float(accountant.get_epsilon(delta, eps_error=error)))
            target_error = max(epsilon / 200, 1e-4)
            if error <= 2 * target_error:
                return epsilon
            error = target_error


def _renyi(noise_multiplier: float, rate: float) -> NDArray[np.float64]:
    """Rényi divergence of one step at each of :data:`ORDERS`; additive over steps and mechanisms."""
    return np.asarray(renyi.compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=1, orders=ORDERS))


def _from_renyi(per_order: NDArray[np.float64], delta: float) -> float:
    with warnings.catch_warnings():  # "the best order is the largest one": ε is then only less tight
        warnings.simplefilter("ignore")
        epsilon, _ = renyi.get_privacy_spent(orders=ORDERS, rdp=per_order, delta=delta)
    return float(epsilon)


def running_epsilon(noise_multiplier: float, delta: float, rate: float) -> RunningEpsilon:
    """ε after k steps by RDP, in microseconds; for progress bars."""
    return RunningEpsilon(noise_multiplier, delta, rate)


class RunningEpsilon:
    """An upper bound on ε after k steps by RDP, cheap enough to compute at every step."""

    accountant: Literal["RDP"] = "RDP"

    def __init__(self, noise_multiplier: float, delta: float, rate: float) -> None:
        self.delta = delta
        self._per_step = _renyi(noise_multiplier, rate)

    def __call__(self, steps: int) -> float:
        return 0.0 if steps < 1 else _from_renyi(self._per_step * steps, self.delta)


def noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The smallest noise multiplier σ (to half a percent of ε) with which ``steps`` steps spend at most ``epsilon``.

    Raises:
        PrivacyInvalid: a number is out of range, or ε needs more noise than :data:`MAX_NOISE`.
    """
    check_epsilon(epsilon)
    _check_mechanism(delta, rate, steps)
    return _noise_for(float(epsilon), float(delta), float(rate), int(steps))


@lru_cache(maxsize=256)
def _noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    def spent(noise: float) -> float:
        return epsilon_for(noise, delta, rate, steps).epsilon

    high = 0.5
    while running_epsilon(high, delta, rate)(steps) > epsilon and spent(high) > epsilon:
        high *= 1.5
        if high > MAX_NOISE:
            raise PrivacyInvalid(
                f"no usable noise gives epsilon = {epsilon} in {steps} steps; raise epsilon or use fewer steps"
            )
    low = high / 1.5
    while spent(low) <= epsilon:
        low, high = low / 1.5, low
    while epsilon - spent(high) > 0.005 * epsilon and high / low > 1.0001:
        middle = low * (high / low) ** _interpolate(spent(low), spent(high), 0.9975 * epsilon)
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return high


def _interpolate(epsilon_at_low: float, epsilon_at_high: float, target: float) -> float:
    """The fraction (0.05 to 0.95) of the way between two σ where ε is ``target``, if log ε is linear in log σ."""
    fraction = math.log(epsilon_at_low / target) / math.log(epsilon_at_low / epsilon_at_high)
    return min(0.95, max(0.05, fraction))
