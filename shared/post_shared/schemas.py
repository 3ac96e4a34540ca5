"""The documents that cross the wire under ``/v1``, one class each. Never imports torch."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="A short name in lower case.")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Reference = Annotated[str, Field(min_length=1, max_length=64)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
T = TypeVar("T")


class Document(BaseModel):
    """Base of all documents: unknown members are refused, so a typing error can't pass as a default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Role(StrEnum):
    PROVIDER = "provider"
    OWNER = "owner"


class Page(Document, Generic[T]):
    """One page of a list; pass ``next_cursor`` as ``?cursor=`` for the next one."""

    items: list[T]
    next_cursor: str | None = None


class Problem(BaseModel):
    """RFC 9457 problem document. ``code`` is stable; further members depend on it."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None = None


# --- tasks --------------------------------------------------------------------------------------------


class TaskForm(Document):
    """What a prompt is for: a template with label words, or free answers. See :class:`post_shared.tasks.Task`."""

    template: str = Field(max_length=2_000, description="The text with a {text} slot, and {mask} for masked models.")
    label_words: dict[str, list[str]] | None = Field(
        default=None, description="Label -> label words. Absent for generation tasks."
    )


# --- models -------------------------------------------------------------------------------------------


class ModelRole(StrEnum):
    TARGET = "target"
    STUDENT = "student"


class Model(Document):
    id: str
    name: Name
    role: ModelRole
    hash: Sha256 = Field(description="SHA-256 over the manifest; a prompt names its model by it.")
    kind: Literal["causal", "masked"]
    architecture: str
    layers: int
    hidden_size: int
    vocabulary: int
    parameters: int
    size_bytes: int
    target_id: str | None = Field(default=None, description="For a student: the target model it came from.")
    created_at: datetime


class ModelFile(Document):
    path: str
    size: int
    sha256: Sha256


class ModelManifest(Document):
    """Every file of a model. ``hash`` is the SHA-256 of the canonical JSON of ``files``."""

    model_id: str
    name: Name
    hash: Sha256
    files: list[ModelFile]


# --- datasets -----------------------------------------------------------------------------------------


class DatasetKind(StrEnum):
    ROWS = "rows"
    """JSON Lines with ``text`` and, if labelled, ``label``."""
    CORPUS = "corpus"
    """Plain text, one paragraph a line."""


class Dataset(Document):
    """Public data at the provider. Private data never becomes one."""

    id: str
    name: Name
    kind: DatasetKind
    rows: int
    labels: list[str] | None = Field(
        default=None,
        description="The labels found, sorted; null when unlabelled, empty when too many to list (free answers).",
    )
    licence: str | None = None
    sha256: Sha256
    size_bytes: int
    created_at: datetime


# --- prompts ------------------------------------------------------------------------------------------


class PromptRole(StrEnum):
    SOURCE = "source"
    TARGET = "target"


class Prompt(Document):
    id: str
    role: PromptRole
    model_id: str
    model_hash: Sha256
    length: int
    width: int
    task: TaskForm
    epsilon: float | None = None
    delta: float | None = None
    sha256: Sha256
    size_bytes: int
    source_id: str | None = Field(default=None, description="For a target prompt: the source prompt it came from.")
    created_at: datetime


# --- jobs ---------------------------------------------------------------------------------------------


class JobKind(StrEnum):
    DISTIL = "distil"
    TRANSFER = "transfer"
    EVALUATE = "evaluate"
    REPORT = "report"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class Job(Document):
    id: str
    kind: JobKind
    state: JobState
    priority: int = Field(default=0, description="The provider's to give; the higher come first.")
    attempt: int
    progress: float = Field(ge=0, le=1)
    stage: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict, description="The latest value of each series.")
    request: dict[str, Any] = Field(description="The document that created the job.")
    result: dict[str, Any] | None = Field(
        default=None, description="distil: model_id, layers; transfer: prompt_id; evaluate: accuracy; report: itself."
    )
    error: Problem | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


class JobEvent(Document):
    """One line of a job's history. ``sequence`` grows by one within a job, from 1."""

    sequence: int
    at: datetime
    kind: Literal["state", "progress", "metrics", "log"]
    data: dict[str, Any]


Form = Annotated[str, Field(max_length=200, pattern=r"^[^{}]*\{text\}[^{}]*$", description="Such as '{text} It was'.")]


class DistillationCreate(Document):
    """Distil a target model into a student (method §1)."""

    target: Reference = Field(description="Id or name of the target model.")
    name: Name = Field(description="Name of the student to be.")
    corpus: list[Reference] = Field(min_length=1, max_length=100, description="Datasets; rows give their texts.")
    keep_layers: list[int] | int = Field(default=8, description="Indices of the layers to keep, or how many.")
    layer_pattern: Literal["ends", "even", "front", "search"] = Field("front", description="How a number is spread.")
    start: Literal["fold", "copy"] = Field("fold", description="fold: closed-form start; copy: as they are (paper).")
    answer_forms: list[Form] = Field([], max_length=20, description="Short paragraphs are put into one of them.")
    freeze_head: bool = True
    freeze_embeddings: bool = True
    steps: int | None = Field(default=None, ge=1, le=100_000_000)
    minutes: float | None = Field(default=None, gt=0)
    plateau: bool = Field(default=False, description="Stop when the smoothed loss no longer falls.")
    learning_rate: float = Field(default=1e-3, gt=0, description="The paper: 2.5e-4, for 500,000 steps.")
    alignment: float = Field(default=0.0, ge=0, description="Weight of the hidden states inside; not in the paper.")
    batch_tokens: int = Field(default=512, ge=32, le=2**24)
    accumulate: int | None = Field(
        default=None,
        ge=1,
        le=2**16,
        description="Parts in which a batch is taken; default: as few as fit the memory.",
    )
    sequence_length: int = Field(default=64, ge=8, le=2**16)
    seed: Seed = 0


class TransferCreate(Document):
    """Move a source prompt to the target model with public text (method §3)."""

    prompt: Reference = Field(description="Id of the source prompt.")
    target: Reference = Field(description="Id or name of the target model.")
    dataset: Reference = Field(description="Id or name of a public dataset; its labels are not used by the transfer.")
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        default=0.7,
        description="Weight of Eq. 5 (paper) or of the target's opinion. 'auto': Eq. 6, if the dataset's labels fit.",
    )
    method: Literal["ensemble", "paper"] = Field("ensemble", description="paper: Eq. 3; ensemble: class scores.")
    start: Literal["task", "source"] | None = Field(None, description="task: words that state it; source: the prompt.")
    steps: int = Field(default=250, ge=1, le=100_000)
    batch_size: int = Field(default=16, ge=1, le=1024)
    learning_rate: float | None = Field(None, gt=0, description="None: 0.003 from words, 0.03 from the source prompt.")
    temperature: float = Field(default=2.0, gt=0, description="Of the paper's method; the ensemble has none.")
    max_rows: int = Field(default=512, ge=1, le=2**24)
    max_length: int = Field(default=128, ge=8, le=2**16)
    seed: Seed = 0


class EvaluationCreate(Document):
    """Measure a model, with or without a prompt, on a labelled public dataset."""

    model: Reference = Field(description="Id or name of a target or student model.")
    dataset: Reference
    prompt: Reference | None = None
    task: TaskForm | None = Field(default=None, description="Needed when there is no prompt.")
    max_rows: int = Field(default=1000, ge=1, le=2**24)


class JobCreated(Document):
    job_id: str


# --- predictions --------------------------------------------------------------------------------------


class PredictionCreate(Document):
    """Ask a target model, through a prompt or (zero-shot) through a task alone."""

    model: Reference = Field(description="Id or name of the target model.")
    prompt: Reference | None = Field(default=None, description="Id of a target or source prompt of the model's width.")
    task: TaskForm | None = Field(default=None, description="Needed when there is no prompt.")
    texts: list[Annotated[str, Field(min_length=1, max_length=20_000)]] = Field(min_length=1, max_length=256)
    max_new_tokens: int = Field(default=16, ge=1, le=256, description="Generation tasks only.")


class Prediction(Document):
    label: str | None = Field(default=None, description="The label with the highest score; null for generation.")
    scores: dict[str, float] = Field(default_factory=dict, description="Label -> probability.")
    text: str | None = Field(default=None, description="The generated answer; null for classification.")
    cut: bool = Field(default=False, description="The text was too long for the model and lost its end.")


class Predictions(Document):
    model_id: str
    prompt_id: str | None
    items: list[Prediction]


# --- health ------------------------------------------------------------------------------------------


class Health(Document):
    status: Literal["ok", "unavailable"]
    checks: dict[str, str] = Field(default_factory=dict)
