"""Stored trade-off reports and their documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.orm import Session

from post_server.db.tables import JobRow, ModelRow, now
from post_shared.errors import Conflict, NotFound
from post_shared.schemas.jobs import JobKind, JobState
from post_shared.schemas.reports import ModelSize, RecordedLoss, ReportCreate, TradeOffReport

if TYPE_CHECKING:
    from post_server.reports.trade_off import TradeOff

LOSSES = ("loss", "ce", "lm", "cos")


def recorded_loss(session: Session, student: ModelRow) -> RecordedLoss | None:
    """The last losses of the distillation job that made the student, if it ran here."""
    statement = select(JobRow).where(JobRow.kind == JobKind.DISTIL, JobRow.state == JobState.SUCCEEDED)
    for job in session.scalars(statement):
        if (job.result or {}).get("model_id") == student.id:
            losses = {name: job.metrics[name] for name in LOSSES if job.metrics.get(name) is not None}
            return RecordedLoss(job_id=job.id, corpus=job.request["corpus"], losses=losses)
    return None


def report_document(
    job: JobRow, target: ModelRow, student: ModelRow, recorded: RecordedLoss | None, measured: TradeOff
) -> TradeOffReport:
    """The report as the API shows it."""
    return TradeOffReport(
        job_id=job.id,
        made_at=now(),
        target=_size(target),
        student=_size(student),
        parameter_share=student.parameters / target.parameters,
        byte_share=student.size_bytes / target.size_bytes,
        recorded_loss=recorded,
        measured_loss=measured.loss,
        tasks=list(measured.tasks),
        members=measured.members,
        non_members=measured.non_members,
        leakage=list(measured.leakage),
        request=ReportCreate.model_validate(job.request),
    )


def _size(row: ModelRow) -> ModelSize:
    return ModelSize.model_validate({name: getattr(row, name) for name in ModelSize.model_fields})


def finished_report(session: Session, job_id: str) -> TradeOffReport:
    """The report of a finished job.

    Raises:
        NotFound: no such report.
        Conflict: the job has not succeeded.
    """
    row = session.get(JobRow, job_id)
    if row is None or row.kind is not JobKind.REPORT:
        raise NotFound(f"There is no report {job_id!r}.", job=job_id)
    if row.result is None:
        raise Conflict(f"The job of the report {job_id} is {row.state.value}; there is no result.", job=job_id)
    return TradeOffReport.model_validate(row.result)
