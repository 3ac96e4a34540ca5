"""How charges on the same data add up.

The budget of a row (or user) is the composition of all runs on data sets that contain it; that of a data set is the
largest one of its rows. Composition is that of the mechanisms, by PRV and at one δ, not the sum of their ε.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from post_client.privacy.accounting import Mechanism, Unit, compose

WITHOUT_PRIVACY = "a run without differential privacy is among them"
MIXED_UNITS = "runs per row and per user are mixed, and no sum of the two is proven"


@dataclass(frozen=True)
class Charge:
    """What one run does to the data. ``mechanism`` is None where nothing is guaranteed (ε = ∞)."""

    unit: Unit
    delta: float
    mechanism: Mechanism | None

    @property
    def epsilon(self) -> float:
        return total([self]).epsilon


@dataclass(frozen=True)
class Total:
    """ε of several runs together, at ``delta``; infinite where nothing can be promised, and ``why``."""

    epsilon: float
    delta: float
    runs: int
    why: str = ""

    def words(self) -> str:
        """``epsilon = 3.21 (delta = 1e-05)``"""
        if math.isinf(self.epsilon):
            return f"no bound on epsilon ({self.why})"
        return f"epsilon = {self.epsilon:.3f} (delta = {self.delta:g})"

    def in_runs(self) -> str:
        """``epsilon = 3.21 (delta = 1e-05) in 2 runs``"""
        return f"{self.words()} in {self.runs} run{'' if self.runs == 1 else 's'}"


NOTHING = Total(0.0, 0.0, 0)


def total(charges: Sequence[Charge]) -> Total:
    """All charges on one row together, at the least δ among them."""
    if not charges:
        return NOTHING
    delta, runs = min(charge.delta for charge in charges), len(charges)
    mechanisms = [charge.mechanism for charge in charges if charge.mechanism is not None]
    if len(mechanisms) < runs:
        return Total(math.inf, delta, runs, WITHOUT_PRIVACY)
    if len({charge.unit for charge in charges}) > 1:
        return Total(math.inf, delta, runs, MIXED_UNITS)
    return Total(compose(mechanisms, delta).epsilon, delta, runs)
