"""What the data owner chooses about privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from post_client.privacy.accounting import Unit, check_epsilon
from post_shared.errors import PrivacyInvalid


@dataclass(frozen=True)
class PrivacyConfig:
    """A privacy budget and how to spend it. Checked when made; what depends on the data is checked by
    :meth:`post_client.privacy.PrivacyPlan.make`."""

    epsilon: float = 8.0
    """The budget of the whole run (the paper's value)."""
    delta: float | None = None
    """None: :func:`~post_client.privacy.accounting.default_delta` of the number of rows (or users)."""
    unit: Unit = "row"
    """``user``: users are sampled, the sum of a user's gradients is clipped, and every row must name its user."""
    trials: int = 1
    """How many runs share this budget: a search over hyperparameters is charged for all of them."""
    max_grad_norm: float = 0.1
    """c. Adam forgets the scale of gradients, so c matters only against their norm: small means "always clip"."""
    batch_size: int | None = None
    """Rows (or users) expected in a batch; large ones carry less noise per row. None: as in tuning without privacy."""
    steps: int | None = None
    """Fixed in advance: stopping early by a private score would cost budget. None: as in tuning without privacy."""
    micro_batch_size: int = 16
    """Rows per forward pass if they are as long as may be; bounds memory and changes nothing else."""
    seed: int | None = None
    """For tests only: repeatable randomness. A result made with a seed is marked as not private."""

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        if self.delta is not None and not 0 < self.delta < 1:
            raise PrivacyInvalid(f"delta is {self.delta}; it must lie above 0 and below 1 / (number of rows or users)")
        if not 0 < self.max_grad_norm < float("inf"):
            raise PrivacyInvalid(f"the clipping norm is {self.max_grad_norm}; it must be a finite number above 0")
        if self.unit not in get_args(Unit):
            raise PrivacyInvalid(f"privacy is per {' or '.join(get_args(Unit))}, not per {self.unit!r}")
        for name in ("batch_size", "steps", "micro_batch_size", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PrivacyInvalid(f"{name} is {value}; it must be at least 1")
