"""The data owner's privacy settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from post_client.privacy.accounting import Unit, check_epsilon
from post_shared.errors import PrivacyInvalid


@dataclass(frozen=True)
class PrivacyConfig:
    """A privacy budget and how to spend it. Values are checked here, and those that depend on the data by
    :meth:`post_client.privacy.PrivacyPlan.make`.

    Raises:
        PrivacyInvalid: a value is out of range.
    """

    epsilon: float = 8.0
    """The budget of the whole run (the paper's value)."""
    delta: float | None = None
    """None: :data:`~post_client.privacy.accounting.DEFAULT_DELTA`, for up to 100,000 rows (or users)."""
    unit: Unit = "row"
    """``user``: users are sampled, each user's summed gradient is clipped, and every row needs a user."""
    trials: int = 1
    """Number of runs that share this budget: a hyperparameter search is charged for all of them."""
    max_grad_norm: float = 0.1
    """Clipping norm c. Adam is scale-invariant, so c matters only relative to gradient norms: small clips always."""
    batch_size: int | None = None
    """Expected rows (or users) per batch; large batches have less noise per row. None: from the tuning options."""
    steps: int | None = None
    """Fixed in advance: early stopping by a private score would cost budget. None: from the tuning options."""
    seed: int | None = None
    """For tests only: reproducible randomness. A result made with a seed is marked as not private."""

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        if self.delta is not None and not 0 < self.delta < 1:
            raise PrivacyInvalid(f"delta is {self.delta}; it must lie above 0 and below 1 / (number of rows or users)")
        if not 0 < self.max_grad_norm < float("inf"):
            raise PrivacyInvalid(f"the clipping norm is {self.max_grad_norm}; it must be a finite number above 0")
        if self.unit not in get_args(Unit):
            raise PrivacyInvalid(f"privacy is per {' or '.join(get_args(Unit))}, not per {self.unit!r}")
        for name in ("batch_size", "steps", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PrivacyInvalid(f"{name} is {value}; it must be at least 1")
