"""The one-run audit of private tuning: canaries of two kinds, one prompt tuned with each kind.

*Data canaries* are rows with wrong labels; the auditor sees the finished prompt, as the provider does. *Gradient
canaries* are the strongest that the proof allows for: rows whose gradient is one direction of their own at every step,
and an auditor who sees every noisy sum and knows all that the real rows added to it.
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
MOST = 1000
"""Canaries by default, if the rows are enough."""


@dataclass(frozen=True)
class Finding:
    """A lower bound on the ε of a run, beside the ε that the run claims."""

    kind: Kind
    claimed: float
    evidence: Evidence

    @property
    def refuted(self) -> bool:
        """True: the run spends more than it claims (or a coin fell badly, once in 20 audits)."""
        return self.evidence.epsilon > self.claimed


@dataclass(frozen=True)
class DataCanaries:
    """The rows with wrong labels at ``places``, and in which run each is included."""

    rows: tuple[Row, ...]
    places: NDArray[np.int64]
    included: Members
    """(runs, m)"""

    @classmethod
    def choose(cls, task: Task, rows: Sequence[Row], count: int, runs: int, seed: int) -> DataCanaries:
        """Take ``count`` random rows and give each one of the labels that it hasn't."""
        generator = np.random.default_rng([seed, 1])
        places = np.sort(generator.permutation(len(rows))[:count])
        changed = list(rows)
        for at in places.tolist():
            wrong = [label for label in task.labels if label != rows[at].label]
            changed[at] = Row(rows[at].text, wrong[generator.integers(len(wrong))])
        return cls(tuple(changed), places, generator.random((runs, count)) < 0.5)

    def members(self) -> Members:
        """(runs, N): all rows that are no canaries, and the included canaries."""
        every = np.ones((len(self.included), len(self.rows)), dtype=bool)
        every[:, self.places] = self.included
        return every


class GradientCanaries:
    """One direction of the prompt for each canary of one run, at right angles to all others.

    See :class:`post_client.privacy.Canaries`.
    """

    def __init__(self, shape: tuple[int, int], count: int, run: int, *, rate: float, privacy: PrivacyConfig, seed: int):
        """
        Args:
            shape: (l, d) of the prompt.
            run: its number; each has coins and batches of its own, and all have the same directions.
            rate: how often each included canary is sampled, that of the rows.

        Raises:
            InvalidInput: more canaries than directions.
        """
        if count > shape[0] * shape[1]:
            raise InvalidInput(f"a prompt of {shape[0]} × {shape[1]} has no {count} directions; use fewer canaries")
        self.shape = shape
        self.length = 2.0 * privacy.max_grad_norm  # above the clipping norm, so that each counts as much as a row can
        directions = np.random.default_rng([seed, 2]).permutation(shape[0] * shape[1])[:count]
        self.directions = torch.from_numpy(directions)
        self.included: NDArray[np.bool_] = np.random.default_rng([seed, 3, run]).random(count) < 0.5
        self.scores = torch.zeros(count, dtype=torch.float64)
        self._sampler = PoissonSampler(max(1, int(self.included.sum())), rate, _randomness(privacy, run))

    def gradients(self, step: int) -> Tensor:
        own = np.flatnonzero(self.included)
        sampled = own[self._sampler.draw(step)] if len(own) else own
        rows = torch.zeros(len(sampled), self.shape[0] * self.shape[1])
        rows[torch.arange(len(sampled)), self.directions[sampled]] = self.length
        return rows.reshape(-1, *self.shape)

    def observe(self, noisy: Tensor) -> None:
        self.scores += noisy.flatten()[self.directions].cpu()

    def state(self) -> dict[str, Tensor]:
        return {"scores": self.scores}


def _randomness(privacy: PrivacyConfig, run: int) -> SecureRandomness | SeededRandomness:
    return SecureRandomness() if privacy.seed is None else SeededRandomness(10**6 + privacy.seed + run)


def default_canaries(rows: int) -> int:
    """As many as the rows allow, up to :data:`MOST`: half of the rows, for the others have to tune the prompt."""
    return min(MOST, rows // 2)


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
    """Tune privately with canaries of each kind and bound ε from below: first the data canaries' findings.

    Each finding comes from a single run; ``runs`` makes several of each kind.

    Raises:
        InvalidInput: more canaries than half of the rows, or none.
        DataInvalid, TaskInvalid, ModelUnsafe, PrivacyInvalid, Cancelled: as ``tune``.
    """
    check_rows(task, rows)
    count = default_canaries(len(rows)) if canaries is None else canaries
    if not 1 <= count <= len(rows) // 2:
        raise InvalidInput(f"{count} canaries for {len(rows)} rows; there are 1 at least and half as many as rows")
    chosen = DataCanaries.choose(task, rows, count, runs, seed)
    nominal = len(rows) - count // 2
    plan = PrivacyPlan.make(privacy, nominal, batch_size=config.batch_size, steps=config.steps)
    start = starting_prompt(student, task, config).embeddings
    shape = (int(start.shape[0]), int(start.shape[1]))
    sharp = [GradientCanaries(shape, count, run, rate=plan.rate, privacy=privacy, seed=seed) for run in range(runs)]
    without = np.ones((runs, len(rows)), dtype=bool)
    without[:, chosen.places] = False  # the places of rows are taken by gradient canaries there
    tuned = tune_shadows(
        student, task, chosen.rows, np.concatenate([chosen.members(), without]), config, privacy=privacy, public=public,
        nominal=nominal, canaries=lambda k: sharp[k - runs] if k >= runs else None, stage="canaries", on_progress=on_progress, checkpoint=checkpoint,
    )  # fmt: skip
    rows_in_question = [chosen.rows[at] for at in chosen.places]
    prompts = torch.cat([start[None], tuned.prompts[:runs].cpu()])
    before, *after = confidences(student, task, rows_in_question, prompts, config, on_progress=on_progress)
    found = [("data", own - before, coins) for own, coins in zip(after, chosen.included, strict=True)]
    found += [("gradient", each.scores.numpy(), each.included) for each in sharp]
    return [
        Finding(kind, privacy.epsilon, evidence(scores, coins, plan.delta, confidence))  # type: ignore[arg-type]
        for kind, scores, coins in found
    ]
