"""One private tuning run, fixed in every number before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

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
from post_shared.model.language_model import LanguageModel

TENTHS = 10
"""How often in a run the spent ε is computed exactly: each time takes half a second."""


@dataclass(frozen=True)
class PrivacyPlan:
    """Sampling rate q, noise σ and steps T, made by :meth:`make`; from it come sampler and optimizer."""

    config: PrivacyConfig
    examples: int
    rate: float
    steps: int
    delta: float
    noise_multiplier: float
    spent: Spending
    """What all trials spend together: at most the config's ε."""
    key: bytes | None = None
    """Where the randomness comes from, so that a run can be started again; None: fresh at every draw."""

    @classmethod
    def make(cls, config: PrivacyConfig, examples: int, *, batch_size: int, steps: int) -> PrivacyPlan:
        """Fix everything for ``examples`` rows (or users).

        ``batch_size`` and ``steps`` stand in for what the configuration leaves open.

        Raises:
            PrivacyInvalid: δ is not below 1/N, or no bearable noise gives this ε.
        """
        batch_size, steps = config.batch_size or batch_size, config.steps or steps
        delta = default_delta(examples) if config.delta is None else config.delta
        check_delta(delta, examples)
        rate = min(1.0, batch_size / examples)
        every = steps * config.trials
        noise = noise_for(config.epsilon, delta, rate, every)
        return cls(config, examples, rate, steps, delta, noise, epsilon_for(noise, delta, rate, every))

    @property
    def mechanism(self) -> Mechanism | None:
        """What all trials do to the data; None if the randomness gives no guarantee."""
        if not self.randomness.private:
            return None
        return Mechanism(self.noise_multiplier, self.rate, self.steps * self.config.trials)

    def drawing_from(self, key: bytes) -> PrivacyPlan:
        """The same plan with the randomness of a reserved run; a seed for tests stays what it is."""
        return replace(self, key=key)

    @cached_property
    def randomness(self) -> Randomness:
        if self.config.seed is not None:
            return SeededRandomness(self.config.seed)
        return SecureRandomness() if self.key is None else KeyedRandomness(self.key)

    def sampler(self) -> PoissonSampler:
        """The batches: exactly ``steps`` of them may be drawn for one result."""
        return PoissonSampler(self.examples, self.rate, self.randomness)

    def optimizer(
        self,
        prompt: nn.Parameter,
        learning_rate: float,
        users: Sequence[int] | None = None,
        *,
        longest: int | None = None,
        student: LanguageModel | None = None,
    ) -> PromptDPSGD:
        """``users`` is the user of each row, by number; needed where the unit is a user. ``longest`` and ``student``
        are as in :class:`PromptDPSGD`."""
        settings = {
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.config.max_grad_norm,
            "expected_batch_size": self.rate * self.examples,
        }
        more = {"micro_batch_size": self.config.micro_batch_size, "randomness": self.randomness}
        more |= {"longest": longest, "student": student}
        if self.config.unit == "row":
            return PromptDPSGD(prompt, learning_rate, **settings, **more)  # type: ignore[arg-type]
        if users is None:
            raise PrivacyInvalid("privacy per user needs the user of each row")
        return UserDPSGD(prompt, learning_rate, users=users, **settings, **more)

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

    def statement(self, average_iterates: bool = False) -> PrivacyStatement:
        """What may be said about the result of all ``steps`` steps: the last iterate or, with ``average_iterates``, the average of
        those of the second half."""
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
