"""The metrics of a job as time series: the document of ``/v1/jobs/{job}/metrics``. Never imports torch."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from post_shared.schemas.common import Document


class MetricPoint(Document):
    """One value of a series. ``sequence`` is the number of the event that reported it."""

    sequence: int
    at: datetime
    stage: str
    step: int
    value: float


class JobMetrics(Document):
    """The metrics of a job, oldest point first; for a long job, one page of them."""

    job_id: str
    series: dict[str, list[MetricPoint]] = Field(description="Name of the metric, such as 'loss' -> its points.")
    next_cursor: str | None = None
