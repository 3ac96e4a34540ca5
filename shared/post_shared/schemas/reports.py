"""The documents of a trade-off report: what a student can do and what it leaks. Never imports torch."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from post_shared.schemas.common import Document, Reference, Seed
from post_shared.schemas.tasks import TaskSpec
from post_shared.schemas.tuning import PLAIN, TuneOptions

Datasets = Annotated[list[Reference], Field(min_length=1, max_length=20)]


class ReportTask(Document):
    """A public labelled dataset and how its texts become questions."""

    dataset: Reference
    task: TaskSpec = Field(description="With label words; its labels are the dataset's.")


class ReportCreate(Document):
    """Compare a student with its target model: size, distillation loss, accuracy, leakage of training text."""

    student: Reference = Field(description="Id or name of the student; the target is the model that it came from.")
    tasks: list[ReportTask] = Field(min_length=1, max_length=20, description="Each is split into two parts by rows.")
    members: Datasets = Field(description="Datasets of text that the models were trained on.")
    non_members: Datasets = Field(description="Datasets of text of the same kind that they never saw.")
    tune_rows: int = Field(default=1000, ge=2, le=2**24, description="Rows of a task to tune on, at most.")
    test_rows: int = Field(default=400, ge=1, le=2**24, description="Rows of a task held out, at most half of it.")
    texts: int = Field(default=500, ge=1, le=2**24, description="Members, and non-members, to attack, at most.")
    tuning: TuneOptions = Field(default=PLAIN, description="How the prompts of the tasks are tuned.")
    seed: Seed = 0


class Figures(Document):
    """Base of the parts of a report, which never change."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Estimate(Figures):
    """A figure and its interval by bootstrap, of 95 % in a report."""

    value: float
    low: float
    high: float


class ModelSize(Figures):
    id: str
    name: str
    hash: str
    layers: int
    parameters: int
    size_bytes: int


class RecordedLoss(Figures):
    """What the distillation job said last. ``losses`` has ``ce``, ``lm``, ``cos`` and their weighted sum ``loss``."""

    job_id: str
    corpus: list[str]
    losses: dict[str, float]


class MeasuredLoss(Figures):
    """The terms of Eq. 1, each a mean over the tokens of text that the student was not distilled on."""

    ce: float
    lm: float
    cos: float
    tokens: int


class TaskFigures(Figures):
    """Accuracies on the held-out rows of one public task."""

    dataset: str
    tune_rows: int
    test_rows: int
    majority: float = Field(description="Share of the most frequent label: what guessing it always would reach.")
    target_zero_shot: Estimate
    target_tuned: Estimate
    student_zero_shot: Estimate
    student_tuned: Estimate
    gap: Estimate = Field(description="Tuned target less tuned student: what an owner gains by coming to the target.")
    gap_zero_shot: Estimate = Field(description="Target without a prompt less tuned student.")


class Attack(Figures):
    """How well a score tells members from non-members: 0.5 and 0.01 are guessing."""

    auc: Estimate
    tpr: Estimate = Field(description="True positive rate where at most 1 % of the non-members are taken for members.")


class Leakage(Figures):
    """One score, on both models and the same texts."""

    score: Literal["min_k", "min_k_plus"] = Field(description="Min-K% or Min-K%++.")
    share: float = Field(description="Share of a text's least likely tokens that the score is the mean of.")
    target: Attack
    student: Attack
    auc_drop: Estimate = Field(description="The target's AUC less the student's.")


class TradeOffReport(Figures):
    """Everything about one student; see ``docs/explanation-report.md`` for how to read it."""

    job_id: str
    made_at: datetime
    target: ModelSize
    student: ModelSize
    parameter_share: float = Field(description="The student's parameters as a share of the target's.")
    byte_share: float
    recorded_loss: RecordedLoss | None = Field(description="Null when no distillation job here made the student.")
    measured_loss: MeasuredLoss
    tasks: list[TaskFigures]
    members: int = Field(description="Texts attacked.")
    non_members: int
    leakage: list[Leakage]
    request: ReportCreate
