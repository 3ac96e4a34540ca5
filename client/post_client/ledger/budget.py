"""How charges on the same data compose.

The total of a row (or user) is the composition of all runs on data sets that contain it. The total of a data set is the
largest total of its rows. The mechanisms are composed by the PRV accountant at one δ; their ε are not summed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from post_client.privacy.accounting import Mechanism, Unit, compose

WITHOUT_PRIVACY = "one of the runs had no differential privacy"
MIXED_UNITS = "runs per row and per user are mixed, and no composition of the two is proven"


@dataclass(frozen=True)
class Charge:
    """The privacy cost of one run. ``mechanism`` is None without a guarantee (ε = ∞)."""

    unit: Unit
    delta: float
    mechanism: Mechanism | None

    @property
    def epsilon(self) -> float:
        return total([self]).epsilon


@dataclass(frozen=True)
class Total:
    """ε of several runs together, at ``delta``. ``why`` explains an infinite ε."""

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
    """The composition of all charges on one row, at the smallest δ among them."""
    if not charges:
        return NOTHING
    delta, runs = min(charge.delta for charge in charges), len(charges)
    mechanisms = [charge.mechanism for charge in charges if charge.mechanism is not None]
    if len(mechanisms) < runs:
        return Total(math.inf, delta, runs, WITHOUT_PRIVACY)
    if len({charge.unit for charge in charges}) > 1:
        return Total(math.inf, delta, runs, MIXED_UNITS)
    return Total(compose(mechanisms, delta).epsilon, delta, runs)
