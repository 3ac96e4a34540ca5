"""The plan of a private tuning run; all of its numbers are fixed before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from post_client.privacy.accounting import (
    Mechanism,
    RunningEpsilon,
    Spending,
    check_delta,
    default_delta,
    epsilon_for,
    noise_for,
    running_epsilon,
)
from post_client.privacy.config import PrivacyConfig
from post_client.privacy.dp_optimizer import PromptDPSGD
from post_client.privacy.randomness import KeyedRandomness, Randomness, SecureRandomness, SeededRandomness
from post_client.privacy.sampling import PoissonSampler
from post_client.privacy.statement import PrivacyStatement, library_versions, words_of_unit
from post_client.privacy.user_level import UserDPSGD
from post_shared.errors import PrivacyInvalid

TENTHS = 10
"""How often per run the spent ε is computed by PRV, which takes half a second each time."""


@dataclass(frozen=True)
class PrivacyPlan:
    """Sampling rate q, noise σ and steps T, from :meth:`make`; creates the sampler and the optimizer."""

    config: PrivacyConfig
    examples: int
    rate: float
    steps: int
    delta: float
    noise_multiplier: float
    spent: Spending
    """The ε of all trials together: at most the config's ε."""
    key: bytes | None = None
    """Key of the randomness, so that a run can be restarted. None: fresh randomness at every draw."""

    @classmethod
    def make(cls, config: PrivacyConfig, examples: int, *, batch_size: int, steps: int) -> PrivacyPlan:
        """The plan for ``examples`` rows (or users).

        ``batch_size`` and ``steps`` are used where the configuration has None.

        Raises:
            PrivacyInvalid: δ is not below 1/N, or no usable noise gives this ε.
        """
        batch_size, steps = config.batch_size or batch_size, config.steps or steps
        delta = default_delta(examples) if config.delta is None else config.delta
        check_delta(delta, examples)
        rate = min(1.0, batch_size / examples)
        total_steps = steps * config.trials
        noise = noise_for(config.epsilon, delta, rate, total_steps)
        return cls(config, examples, rate, steps, delta, noise, epsilon_for(noise, delta, rate, total_steps))

    @property
    def mechanism(self) -> Mechanism | None:
        """The mechanism of all trials together; None if the randomness gives no guarantee."""
        if not self.randomness.private:
            return None
        return Mechanism(self.noise_multiplier, self.rate, self.steps * self.config.trials)

    def with_key(self, key: bytes) -> PrivacyPlan:
        """The same plan with the randomness of a reserved run; a test's seed takes precedence."""
        return replace(self, key=key)

    @cached_property
    def randomness(self) -> Randomness:
        if self.config.seed is not None:
            return SeededRandomness(self.config.seed)
        return SecureRandomness() if self.key is None else KeyedRandomness(self.key)

    def sampler(self) -> PoissonSampler:
        """The sampler of batches. Draw exactly ``steps`` of them for one result."""
        return PoissonSampler(self.examples, self.rate, self.randomness)

    def optimizer(self, prompt: nn.Parameter, learning_rate: float, users: Sequence[int] | None = None) -> PromptDPSGD:
        """The optimizer of ``prompt``. ``users``: the user index of each row, required for the unit user.

        Raises:
            PrivacyInvalid: the unit is a user and ``users`` is missing.
        """
        settings: dict[str, Any] = {
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.config.max_grad_norm,
            "expected_batch_size": self.rate * self.examples,
            "randomness": self.randomness,
        }
        if self.config.unit == "row":
            return PromptDPSGD(prompt, learning_rate, **settings)
        if users is None:
            raise PrivacyInvalid("privacy per user needs the user of each row")
        return UserDPSGD(prompt, learning_rate, users=users, **settings)

    @cached_property
    def _running(self) -> RunningEpsilon:
        return running_epsilon(self.noise_multiplier, self.delta, self.rate)

    def epsilon_after(self, step: int) -> float:
        """An upper bound on the ε of the first ``step`` steps, for progress bars; never above that of the whole run.

        The smaller of RDP, which is cheap but loose when there is little noise, and PRV at the next tenth of the run.
        """
        tenth = -(-self.steps // TENTHS)
        next_tenth = min(self.steps, -(-step // tenth) * tenth)
        by_prv = epsilon_for(self.noise_multiplier, self.delta, self.rate, max(1, next_tenth)).epsilon
        return min(self._running(step), by_prv, self.spent.epsilon)

    def statement(self, average_iterates: bool = False) -> PrivacyStatement:
        """The privacy statement for the result of all ``steps`` steps: the last iterate or, with ``average_iterates``,
        the average of the second half's iterates."""
        return PrivacyStatement(
            **words_of_unit(self.config.unit, average_iterates),
            private=self.randomness.private,
            epsilon=self.config.epsilon,
            delta=self.delta,
            epsilon_spent=self.spent.epsilon,
            accountant=self.spent.accountant,
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.rate,
            steps=self.steps,
            trials=self.config.trials,
            max_grad_norm=self.config.max_grad_norm,
            expected_batch_size=self.rate * self.examples,
            randomness=self.randomness.name,
            versions=library_versions(),
        )
