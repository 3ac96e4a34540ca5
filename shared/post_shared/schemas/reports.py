"""The documents of a trade-off report: a student's accuracy and its leakage. Never imports torch."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from post_shared.schemas.common import Document, Reference, Seed
from post_shared.schemas.tasks import TaskSpec
from post_shared.schemas.tuning import PLAIN, TuneOptions

Datasets = Annotated[list[Reference], Field(min_length=1, max_length=20)]


class ReportTask(Document):
    """A public labelled dataset and the task for its texts."""

    dataset: Reference
    task: TaskSpec = Field(description="A classification task with the dataset's labels.")


class ReportCreate(Document):
    """Compare a student with its target model: size, distillation loss, accuracy, leakage of training text."""

    student: Reference = Field(description="Id or name of the student; the target is the model it was distilled from.")
    tasks: list[ReportTask] = Field(
        min_length=1, max_length=20, description="The rows of each are split into two parts."
    )
    members: Datasets = Field(description="Datasets of text that the models were trained on.")
    non_members: Datasets = Field(description="Datasets of similar text that the models never saw.")
    tune_rows: int = Field(default=1000, ge=2, le=2**24, description="Maximum rows per task to tune on.")
    test_rows: int = Field(
        default=400, ge=1, le=2**24, description="Maximum rows per task to test on, and at most half of its rows."
    )
    texts: int = Field(
        default=500, ge=1, le=2**24, description="Maximum texts to attack, of members and of non-members."
    )
    tuning: TuneOptions = Field(default=PLAIN, description="How the prompts of the tasks are tuned.")
    seed: Seed = 0


class Figures(Document):
    """Base of the parts of a report, which are immutable."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Estimate(Figures):
    """A value with its bootstrap confidence interval (95 % in a report)."""

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
    """The last losses of the distillation job: ``ce``, ``lm``, ``cos`` and their weighted sum ``loss``."""

    job_id: str
    corpus: list[str]
    losses: dict[str, float]


class MeasuredLoss(Figures):
    """The terms of Eq. 1, each a mean over tokens of text that the student was not distilled on."""

    ce: float
    lm: float
    cos: float
    tokens: int


class TaskFigures(Figures):
    """Accuracies on the held-out rows of one public task."""

    dataset: str
    tune_rows: int
    test_rows: int
    majority: float = Field(description="Accuracy of always predicting the most frequent label.")
    target_zero_shot: Estimate
    target_calibrated: Estimate | None = Field(
        None, description="The target without a prompt, its label bias removed. Null in reports of earlier versions."
    )
    target_tuned: Estimate
    student_zero_shot: Estimate
    student_tuned: Estimate
    gap: Estimate = Field(description="Tuned target minus tuned student: what an owner gains by using the target.")
    gap_zero_shot: Estimate = Field(description="Target without a prompt minus tuned student.")
    gap_calibrated: Estimate | None = Field(
        None, description="Calibrated target minus tuned student. Null in reports of earlier versions."
    )


class Attack(Figures):
    """How well a score separates members from non-members. Guessing gives AUC 0.5 and TPR 0.01."""

    auc: Estimate
    tpr: Estimate = Field(description="True positive rate at a false positive rate of at most 1 %.")


class Leakage(Figures):
    """One score on both models, on the same texts."""

    score: Literal["min_k", "min_k_plus"] = Field(description="Min-K% or Min-K%++.")
    share: float = Field(description="Share of a text's tokens, the least likely ones, over which the score is a mean.")
    target: Attack
    student: Attack
    auc_drop: Estimate = Field(description="The target's AUC minus the student's.")


class TradeOffReport(Figures):
    """All results about one student; ``docs/explanation-report.md`` explains them."""

    job_id: str
    made_at: datetime
    target: ModelSize
    student: ModelSize
    parameter_share: float = Field(description="The student's parameters as a share of the target's.")
    byte_share: float
    recorded_loss: RecordedLoss | None = Field(
        description="Null if the student wasn't made by a distillation job of this server."
    )
    measured_loss: MeasuredLoss
    tasks: list[TaskFigures]
    members: int = Field(description="Number of member texts attacked.")
    non_members: int
    leakage: list[Leakage]
    request: ReportCreate
