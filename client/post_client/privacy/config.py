"""What the data owner chooses about privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from post_client.privacy.accounting import check_epsilon
from post_shared.errors import PrivacyInvalid

if TYPE_CHECKING:
    from post_client.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class PrivacyConfig:
    """A privacy budget and how to spend it. Checked when made; what depends on the data is checked by :meth:`plan`."""

    epsilon: float = 8.0
    """The budget of the whole run (the paper's value)."""
    delta: float | None = None
    """None: :func:`~post_client.privacy.accounting.default_delta` of the number of rows."""
    clip_norm: float = 0.1
    """c. Adam forgets the scale of gradients, so c matters only against their norm: small means "always clip"."""
    batch_size: int | None = None
    """Rows expected in a batch; large ones carry less noise per row. None: as in tuning without privacy."""
    steps: int | None = None
    """Fixed in advance: stopping early by a private score would cost budget. None: as in tuning without privacy."""
    micro_batch_size: int = 16
    """Rows per forward pass; bounds memory and changes nothing else."""
    seed: int | None = None
    """For tests only: repeatable randomness. A result made with a seed is marked as not private."""

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        if self.delta is not None and not 0 < self.delta < 1:
            raise PrivacyInvalid(f"delta is {self.delta}; it must lie above 0 and below 1 / (number of rows)")
        if not 0 < self.clip_norm < float("inf"):
            raise PrivacyInvalid(f"the clipping norm is {self.clip_norm}; it must be a finite number above 0")
        for name in ("batch_size", "steps", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PrivacyInvalid(f"{name} is {value}; it must be at least 1")

    def plan(self, examples: int, *, batch_size: int, steps: int) -> PrivacyPlan:
        """Fix everything for a data set of ``examples`` rows; the arguments stand in for what this config leaves open.

        Raises:
            PrivacyInvalid: δ is not below 1/N, or no bearable noise gives this ε.
        """
        from post_client.privacy.plan import PrivacyPlan

        return PrivacyPlan.make(self, examples, batch_size=self.batch_size or batch_size, steps=self.steps or steps)
