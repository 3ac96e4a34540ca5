"""Differential privacy for prompt tuning: PromptDPSGD, randomness, accounting and the privacy statement.

plan = PrivacyPlan.make(PrivacyConfig(epsilon=8), len(rows), batch_size=32, steps=300)
sampler, optimizer = plan.sampler(), plan.optimizer(prompt, learning_rate=0.05)
for step in range(plan.steps):
    optimizer.update(loss, encoded.batch(sampler.draw(step)))
print(plan.statement().words())
"""

from __future__ import annotations

from post_client.privacy.accounting import (
    DEFAULT_DELTA,
    Mechanism,
    Spending,
    Unit,
    compose,
    default_delta,
    epsilon_for,
    noise_for,
)
from post_client.privacy.config import PrivacyConfig
from post_client.privacy.dp_optimizer import Canaries, PromptDPSGD
from post_client.privacy.noise import gaussian
from post_client.privacy.plan import PrivacyPlan
from post_client.privacy.randomness import KeyedRandomness, Randomness, SecureRandomness, SeededRandomness, new_key
from post_client.privacy.sampling import PoissonSampler
from post_client.privacy.statement import PrivacyStatement
from post_client.privacy.user_level import UserDPSGD

__all__ = [
    "DEFAULT_DELTA",
    "Canaries",
    "KeyedRandomness",
    "Mechanism",
    "PoissonSampler",
    "PrivacyConfig",
    "PrivacyPlan",
    "PrivacyStatement",
    "PromptDPSGD",
    "Randomness",
    "SecureRandomness",
    "SeededRandomness",
    "Spending",
    "Unit",
    "UserDPSGD",
    "compose",
    "default_delta",
    "epsilon_for",
    "gaussian",
    "new_key",
    "noise_for",
]
