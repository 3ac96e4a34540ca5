"""The one-run audit of private tuning: two kinds of canaries, one prompt tuned with each kind.

*Data canaries* are rows with wrong labels; the auditor sees only the final prompt, as the provider does. *Gradient
canaries* are the strongest ones that the proof allows: each has its own fixed gradient direction at every step, and the
auditor sees every noisy sum and knows the real rows' contribution to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from post_client.audit.shadow_prompts import confidences, tune_shadows
from post_client.privacy import PoissonSampler, PrivacyConfig, PrivacyPlan, SecureRandomness, SeededRandomness
from post_client.tuning.tune import check_rows, starting_prompt
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput
from post_shared.method.audit.lira import Members
from post_shared.method.audit.one_run_bound import CONFIDENCE, Evidence, evidence
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.progress import ProgressCallback, ignore

Kind = Literal["data", "gradient"]
MAX_DEFAULT_CANARIES = 1000
"""Default number of canaries, if there are enough rows."""


@dataclass(frozen=True)
class Finding:
    """A lower bound on the ε of a run, and the ε that the run claims."""

    kind: Kind
    claimed: float
    evidence: Evidence

    @property
    def refuted(self) -> bool:
        """Whether the bound is above the claim. By chance this happens in at most 1 of 20 sound audits."""
        return self.evidence.epsilon > self.claimed


@dataclass(frozen=True)
class DataCanaries:
    """All rows, with wrong labels at ``indices``, and which canaries each run includes."""

    rows: tuple[Row, ...]
    indices: NDArray[np.int64]
    """(m,)"""
    included: Members
    """(runs, m)"""

    @classmethod
    def choose(cls, task: Task, rows: Sequence[Row], count: int, runs: int, seed: int) -> DataCanaries:
        """Choose ``count`` random rows and give each a wrong label."""
        generator = np.random.default_rng([seed, 1])
        indices = np.sort(generator.permutation(len(rows))[:count])
        changed = list(rows)
        for index in indices.tolist():
            wrong = [label for label in task.labels if label != rows[index].label]
            changed[index] = Row(rows[index].text, wrong[generator.integers(len(wrong))])
        return cls(tuple(changed), indices, generator.random((runs, count)) < 0.5)

    def members(self) -> Members:
        """(runs, N): all rows that aren't canaries, and the included canaries."""
        members = np.ones((len(self.included), len(self.rows)), dtype=bool)
        members[:, self.indices] = self.included
        return members


class GradientCanaries:
    """The canaries of one run, each with its own coordinate of the prompt as its gradient direction.

    See :class:`post_client.privacy.Canaries`.
    """

    def __init__(self, shape: tuple[int, int], count: int, run: int, *, rate: float, privacy: PrivacyConfig, seed: int):
        """
        Args:
            shape: (l, d) of the prompt.
            run: the run's number. Runs share the directions; each draws its own inclusions and batches.
            rate: the sampling rate of an included canary, which is that of the rows.

        Raises:
            InvalidInput: more canaries than coordinates.
        """
        if count > shape[0] * shape[1]:
            raise InvalidInput(
                f"a prompt of {shape[0]} × {shape[1]} has fewer than {count} gradient directions; use fewer canaries"
            )
        self.shape = shape
        self.length = 2.0 * privacy.max_grad_norm  # above the clipping norm: after clipping, the largest possible
        directions = np.random.default_rng([seed, 2]).permutation(shape[0] * shape[1])[:count]
        self.directions = torch.from_numpy(directions)
        self.included: NDArray[np.bool_] = np.random.default_rng([seed, 3, run]).random(count) < 0.5
        self.scores = torch.zeros(count, dtype=torch.float64)
        self._sampler = PoissonSampler(max(1, int(self.included.sum())), rate, _randomness(privacy, run))

    def gradients(self, step: int) -> Tensor:
        """The gradients of the canaries sampled at ``step``, (B, l, d)."""
        included = np.flatnonzero(self.included)
        sampled = included[self._sampler.draw(step)] if len(included) else included
        rows = torch.zeros(len(sampled), self.shape[0] * self.shape[1])
        rows[torch.arange(len(sampled)), self.directions[sampled]] = self.length
        return rows.reshape(-1, *self.shape)

    def observe(self, noisy: Tensor) -> None:
        """Add a step's noisy sum (l, d), without the real rows, to the canaries' scores."""
        self.scores += noisy.flatten()[self.directions].cpu()

    def state(self) -> dict[str, Tensor]:
        return {"scores": self.scores}


def _randomness(privacy: PrivacyConfig, run: int) -> SecureRandomness | SeededRandomness:
    return SecureRandomness() if privacy.seed is None else SeededRandomness(10**6 + privacy.seed + run)


def default_canaries(rows: int) -> int:
    """Half of the rows, at most :data:`MAX_DEFAULT_CANARIES`; the other half must train the prompt."""
    return min(MAX_DEFAULT_CANARIES, rows // 2)


def audit_in_one_run(
    student: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    config: TuneOptions,
    privacy: PrivacyConfig,
    *,
    canaries: int | None = None,
    public: Sequence[str] | None = None,
    runs: int = 1,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    on_progress: ProgressCallback = ignore,
    checkpoint: Path | None = None,
) -> list[Finding]:
    """Tune privately with canaries of each kind and compute lower bounds on ε.

    Returns ``runs`` findings from data canaries, then ``runs`` from gradient canaries. Each comes from a single run.

    Raises:
        InvalidInput: no canaries, or more than half of the rows.
        DataInvalid, TaskInvalid, ModelUnsafe, PrivacyInvalid, Cancelled: as ``tune``.
    """
    check_rows(task, rows)
    count = default_canaries(len(rows)) if canaries is None else canaries
    if not 1 <= count <= len(rows) // 2:
        raise InvalidInput(
            f"{count} canaries for {len(rows)} rows; use at least 1 canary and at most half as many as rows"
        )
    data_canaries = DataCanaries.choose(task, rows, count, runs, seed)
    nominal = len(rows) - count // 2
    plan = PrivacyPlan.make(privacy, nominal, batch_size=config.batch_size, steps=config.steps)
    start = starting_prompt(student, task, config).embeddings
    shape = (int(start.shape[0]), int(start.shape[1]))
    gradient_canaries = [
        GradientCanaries(shape, count, run, rate=plan.rate, privacy=privacy, seed=seed) for run in range(runs)
    ]
    without_canaries = np.ones((runs, len(rows)), dtype=bool)
    without_canaries[:, data_canaries.indices] = False  # gradient canaries replace these rows
    members = np.concatenate([data_canaries.members(), without_canaries])
    tuned = tune_shadows(
        student, task, data_canaries.rows, members, config, privacy=privacy, public=public, nominal=nominal,
        canaries=lambda k: gradient_canaries[k - runs] if k >= runs else None, stage="canaries",
        on_progress=on_progress, checkpoint=checkpoint,
    )  # fmt: skip
    canary_rows = [data_canaries.rows[index] for index in data_canaries.indices]
    prompts = torch.cat([start[None], tuned.prompts[:runs].cpu()])
    before, *after = confidences(student, task, canary_rows, prompts, config, on_progress=on_progress)
    observed = [("data", final - before, coins) for final, coins in zip(after, data_canaries.included, strict=True)]
    observed += [("gradient", each.scores.numpy(), each.included) for each in gradient_canaries]
    return [
        Finding(kind, privacy.epsilon, evidence(scores, coins, plan.delta, confidence))  # type: ignore[arg-type]
        for kind, scores, coins in observed
    ]
