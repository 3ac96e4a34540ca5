"""A whole audit: LiRA against prompts tuned without and with differential privacy, and the one-run bound on ε."""

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
    """How much to audit; 0 leaves a part out."""

    shadows: int = 16
    """Shadow prompts of each arm. Each is the target once."""
    canaries: int | None = None
    """Of each kind in the one-run audit. None: as many as the rows allow, up to 1000."""
    confidence: float = CONFIDENCE
    seed: int = 0
    """Draws halves and canaries. The noise of private runs comes from elsewhere."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise InvalidInput(f"the confidence is {self.confidence}; it lies between 0.5 and 1")
        if self.shadows < 0 or (self.canaries or 0) < 0:
            raise InvalidInput("the numbers of shadow prompts and canaries aren't below 0")
        if self.shadows == 0 and self.canaries == 0:
            raise InvalidInput("without shadow prompts and without canaries there is nothing to audit")


@dataclass(frozen=True)
class Arm:
    """One way of tuning: its settings, its budget (None without differential privacy), and how LiRA fares."""

    config: TuneOptions
    privacy: PrivacyConfig | None

    @property
    def name(self) -> str:
        return "without DP" if self.privacy is None else f"ε = {self.privacy.epsilon:g}"


@dataclass(frozen=True)
class AuditReport:
    """What an audit found. It is computed from private rows without noise: it stays on the owner's machine."""

    about: Mapping[str, Any]
    attacks: Mapping[str, Sequence[Attack]]
    """By the name of the arm."""
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
    """Attack each arm with LiRA, and bound the ε of the private ones from below in one run each.

    ``public`` are the public texts of ``tune``. With a ``checkpoint`` folder a killed audit goes on where it was.

    Raises:
        InvalidInput: a generation task, or too few rows or prompts.
        DataInvalid, TaskInvalid, ModelUnsafe, PrivacyInvalid, Cancelled: as ``tune``.
    """
    check_rows(task, rows)
    if config.shadows:
        check_size(config.shadows, len(rows))
    attacks: dict[str, list[Attack]] = {}
    findings: list[Finding] = []
    members = random_halves(config.shadows, len(rows), config.seed)
    for arm in arms:
        place = None if checkpoint is None else checkpoint / ("plain" if arm.privacy is None else "private")
        if config.shadows:
            made = tune_shadows(
                student, task, rows, members, arm.config, privacy=arm.privacy, public=public,
                stage=f"shadow prompts {arm.name}", on_progress=on_progress, checkpoint=place and place / "shadows",
            )  # fmt: skip
            scores = confidences(
                student, task, rows, made.prompts, arm.config, stage=f"scores {arm.name}", on_progress=on_progress
            )
            attacks[arm.name] = [
                attack(scores, members, variant, confidence=config.confidence, seed=config.seed) for variant in VARIANTS
            ]
        if arm.privacy is not None and config.canaries != 0:
            findings += audit_in_one_run(
                student, task, rows, arm.config, arm.privacy, canaries=config.canaries, public=public,
                seed=config.seed, confidence=config.confidence, on_progress=on_progress,
                checkpoint=place and place / "canaries",
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
