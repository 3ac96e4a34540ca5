"""What a job measured, as series: the document of ``/v1/jobs/{job}/metrics``. Never imports torch."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from post_shared.schemas.common import Document


class MetricPoint(Document):
    """One value of a series. ``sequence`` is that of the event in which it came."""

    sequence: int
    at: datetime
    stage: str
    step: int
    value: float


class JobMetrics(Document):
    """The series of a job, oldest point first; of a long job, one page of them."""

    job_id: str
    series: dict[str, list[MetricPoint]] = Field(description="Name -> points, such as 'loss'.")
    next_cursor: str | None = None
