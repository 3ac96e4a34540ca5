"""The full audit: LiRA against prompts tuned with and without differential privacy, and the one-run bound on ε."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from post_client.audit.canaries import Finding, audit_in_one_run
from post_client.audit.shadow_prompts import confidences, tune_shadows
from post_client.privacy import PrivacyConfig
from post_client.privacy.statement import library_versions
from post_client.tuning.tune import check_rows
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput
from post_shared.method.audit.lira import VARIANTS, Attack, attack, check_size, random_halves
from post_shared.method.audit.one_run_bound import CONFIDENCE
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.progress import ProgressCallback, ignore


@dataclass(frozen=True)
class AuditConfig:
    """The size of an audit; 0 skips a part."""

    shadows: int = 16
    """Shadow prompts per arm. Each is the attack's target once."""
    canaries: int | None = None
    """Canaries of each kind in the one-run audit. None: as many as the rows allow, up to 1000."""
    confidence: float = CONFIDENCE
    seed: int = 0
    """Seed for halves and canaries. It doesn't affect the noise of private runs."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise InvalidInput(f"the confidence is {self.confidence}; it must be at least 0.5 and below 1")
        if self.shadows < 0 or (self.canaries or 0) < 0:
            raise InvalidInput("the numbers of shadow prompts and canaries can't be negative")
        if self.shadows == 0 and self.canaries == 0:
            raise InvalidInput("with neither shadow prompts nor canaries there is nothing to audit")


@dataclass(frozen=True)
class Arm:
    """One tuning configuration to audit: its settings and its budget (None without differential privacy)."""

    config: TuneOptions
    privacy: PrivacyConfig | None

    @property
    def name(self) -> str:
        return "without DP" if self.privacy is None else f"ε = {self.privacy.epsilon:g}"


@dataclass(frozen=True)
class AuditReport:
    """The results of an audit. They are computed from private rows without noise: keep them on this machine."""

    about: Mapping[str, Any]
    attacks: Mapping[str, Sequence[Attack]]
    """By name of the arm."""
    findings: Sequence[Finding]


def audit(
    student: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    arms: Sequence[Arm],
    config: AuditConfig,
    *,
    public: Sequence[str] | None = None,
    on_progress: ProgressCallback = ignore,
    checkpoint: Path | None = None,
) -> AuditReport:
    """Attack each arm with LiRA, and compute a lower bound on the ε of each private arm in one run.

    ``public``: the public texts, as in ``tune``. With a ``checkpoint`` folder, an interrupted audit resumes.

    Raises:
        InvalidInput: a generation task, or too few rows, shadow prompts or canaries.
        DataInvalid, TaskInvalid, ModelUnsafe, PrivacyInvalid, Cancelled: as ``tune``.
    """
    check_rows(task, rows)
    if config.shadows:
        check_size(config.shadows, len(rows))
    attacks: dict[str, list[Attack]] = {}
    findings: list[Finding] = []
    members = random_halves(config.shadows, len(rows), config.seed)
    for arm in arms:
        folder = None if checkpoint is None else checkpoint / ("plain" if arm.privacy is None else "private")
        if config.shadows:
            shadows = tune_shadows(
                student, task, rows, members, arm.config, privacy=arm.privacy, public=public,
                stage=f"shadow prompts {arm.name}", on_progress=on_progress, checkpoint=folder and folder / "shadows",
            )  # fmt: skip
            scores = confidences(
                student, task, rows, shadows.prompts, arm.config, stage=f"scores {arm.name}", on_progress=on_progress
            )
            attacks[arm.name] = [
                attack(scores, members, variant, confidence=config.confidence, seed=config.seed) for variant in VARIANTS
            ]
        if arm.privacy is not None and config.canaries != 0:
            findings += audit_in_one_run(
                student, task, rows, arm.config, arm.privacy, canaries=config.canaries, public=public,
                seed=config.seed, confidence=config.confidence, on_progress=on_progress,
                checkpoint=folder and folder / "canaries",
            )  # fmt: skip
    about = {
        "rows": len(rows),
        "audit": asdict(config),
        "arms": {
            arm.name: {"tune": arm.config.model_dump(), "privacy": arm.privacy and asdict(arm.privacy)} for arm in arms
        },
        "public_texts": None if public is None else len(public),
        "versions": library_versions(),
    }
    return AuditReport(about, attacks, findings)
