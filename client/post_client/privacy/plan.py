"""One private tuning run, fixed in every number before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from post_client.privacy.accounting import (
    RunningEpsilon,
    Spending,
    check_delta,
    default_delta,
    epsilon_for,
    noise_for,
    running_epsilon,
)
from post_client.privacy.config import PrivacyConfig
from post_client.privacy.optimizer import PromptDPSGD
from post_client.privacy.sampling import PoissonSampler, Randomness, SecureRandomness, SeededRandomness
from post_client.privacy.statement import PrivacyStatement, library_versions

TENTHS = 10
"""How often in a run the spent ε is computed exactly: each time takes half a second."""


@dataclass(frozen=True)
class PrivacyPlan:
    """Sampling rate q, noise σ and steps T, made by :meth:`PrivacyConfig.plan`; from it come sampler and optimizer."""

    config: PrivacyConfig
    examples: int
    rate: float
    steps: int
    delta: float
    noise_multiplier: float
    spent: Spending
    """What the whole run spends: at most the config's ε."""

    @classmethod
    def make(cls, config: PrivacyConfig, examples: int, *, batch_size: int, steps: int) -> PrivacyPlan:
        """See :meth:`PrivacyConfig.plan`."""
        delta = default_delta(examples) if config.delta is None else config.delta
        check_delta(delta, examples)
        rate = min(1.0, batch_size / examples)
        noise = noise_for(config.epsilon, delta, rate, steps)
        return cls(config, examples, rate, steps, delta, noise, epsilon_for(noise, delta, rate, steps))

    @cached_property
    def randomness(self) -> Randomness:
        return SecureRandomness() if self.config.seed is None else SeededRandomness(self.config.seed)

    def sampler(self) -> PoissonSampler:
        """The batches: exactly ``steps`` of them may be drawn for one result."""
        return PoissonSampler(self.examples, self.rate, self.randomness)

    def optimizer(self, prompt: nn.Parameter, learning_rate: float) -> PromptDPSGD:
        return PromptDPSGD(
            prompt,
            learning_rate,
            noise_multiplier=self.noise_multiplier,
            clip_norm=self.config.clip_norm,
            expected_batch_size=self.rate * self.examples,
            micro_batch_size=self.config.micro_batch_size,
            randomness=self.randomness,
        )

    @cached_property
    def _running(self) -> RunningEpsilon:
        return running_epsilon(self.noise_multiplier, self.delta, self.rate)

    def epsilon_after(self, step: int) -> float:
        """An upper bound on what ``step`` steps have spent, for progress bars; never more than the whole run.

        The lesser of RDP, which is cheap but far too much when there is little noise, and PRV at the next tenth of the
        run.
        """
        tenth = -(-self.steps // TENTHS)
        until = min(self.steps, -(-step // tenth) * tenth)
        by_prv = epsilon_for(self.noise_multiplier, self.delta, self.rate, max(1, until)).epsilon
        return min(self._running(step), by_prv, self.spent.epsilon)

    def statement(self) -> PrivacyStatement:
        """What may be said about the result of all ``steps`` steps."""
        return PrivacyStatement(
            private=self.randomness.private,
            epsilon=self.config.epsilon,
            delta=self.delta,
            epsilon_spent=self.spent.epsilon,
            accountant=self.spent.accountant,
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.rate,
            steps=self.steps,
            clip_norm=self.config.clip_norm,
            expected_batch_size=self.rate * self.examples,
            randomness=self.randomness.name,
            versions=library_versions(),
        )
