"""The documents of ``/v1/jobs``. Never imports torch."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from post_shared.schemas.common import Document, Problem


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
    priority: int = Field(default=0, description="Set by the provider; jobs with a higher priority start first.")
    attempt: int
    progress: float = Field(ge=0, le=1)
    stage: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict, description="The latest value of each metric.")
    request: dict[str, Any] = Field(description="The request that created the job.")
    result: dict[str, Any] | None = Field(
        default=None,
        description="distil: model_id, layers; transfer: prompt_id; evaluate: accuracy; report: the report.",
    )
    error: Problem | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


class JobEvent(Document):
    """One entry of a job's history. ``sequence`` counts up from 1 within a job."""

    sequence: int
    at: datetime
    kind: Literal["state", "progress", "metrics", "log"]
    data: dict[str, Any]
