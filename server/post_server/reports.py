"""Trade-off reports at the provider: what an order for one must fit, and what a finished one says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.orm import Session

from post_server.dataset_store import check_labelled, find_dataset
from post_server.model_store import find_model
from post_server.records import DatasetRow, JobRow, ModelRow, now
from post_shared.errors import Conflict, InvalidInput, NotFound
from post_shared.report_schemas import ModelSize, RecordedLoss, ReportCreate, ReportTask, TradeOffReport
from post_shared.schemas import JobKind, JobState, ModelRole
from post_shared.tasks import Task

if TYPE_CHECKING:
    from post_server.ml.trade_off import TradeOff

LOSSES = ("loss", "ce", "lm", "cos")


def check_report(session: Session, order: ReportCreate) -> None:
    """The parts are there and fit together, as far as can be said without reading texts.

    Raises:
        NotFound: no such student or dataset.
        InvalidInput: a task without labels or classes, a dataset named twice, one on both sides of the attack, or
            non-members that the student was distilled on.
    """
    student = find_model(session, order.student, ModelRole.STUDENT)
    if student.target_id is None:
        raise InvalidInput(f"It isn't known which target model {student.name} came from; distil it here.")
    tasks = [_checked_task(session, each) for each in order.tasks]
    if len({row.id for row in tasks}) < len(tasks):
        raise InvalidInput("Each task has a dataset of its own; one is named twice.")
    members = [find_dataset(session, name) for name in order.members]
    others = [find_dataset(session, name) for name in order.non_members]
    both = {row.sha256 for row in members} & {row.sha256 for row in others}
    if both:
        names = ", ".join(sorted(row.name for row in others if row.sha256 in both))
        raise InvalidInput(f"These are both members and non-members: {names}. A text was either trained on or not.")
    recorded = recorded_loss(session, student)
    if recorded is not None:
        _check_never_seen(session, others, recorded)


def _checked_task(session: Session, wanted: ReportTask) -> DatasetRow:
    row = find_dataset(session, wanted.dataset)
    check_labelled(row)
    task = Task.from_form(wanted.task)
    if task.is_generation:
        raise InvalidInput(f"The task of {row.name} has no label words; a report compares classes.")
    unknown = sorted(set(row.labels or ()) - set(task.labels))
    if unknown:
        raise InvalidInput(
            f"The dataset {row.name} has labels that its task doesn't know: {', '.join(unknown[:10])}; "
            f"the task's labels are: {', '.join(task.labels)}."
        )
    return row


def _check_never_seen(session: Session, others: Sequence[DatasetRow], recorded: RecordedLoss) -> None:
    wanted = {row.id for row in others} | {row.name for row in others}
    seen = sorted(wanted & set(recorded.corpus))
    if seen:
        raise InvalidInput(
            f"The student was distilled on {', '.join(seen)} ({recorded.job_id}), so that those are no non-members."
        )


def recorded_loss(session: Session, student: ModelRow) -> RecordedLoss | None:
    """What the distillation job that made the student said last, if one here did."""
    statement = select(JobRow).where(JobRow.kind == JobKind.DISTIL, JobRow.state == JobState.SUCCEEDED)
    for job in session.scalars(statement):
        if (job.result or {}).get("model_id") == student.id:
            losses = {name: job.metrics[name] for name in LOSSES if job.metrics.get(name) is not None}
            return RecordedLoss(job_id=job.id, corpus=job.request["corpus"], losses=losses)
    return None


def report_document(
    job: JobRow, target: ModelRow, student: ModelRow, recorded: RecordedLoss | None, found: TradeOff
) -> TradeOffReport:
    """All that is known about a student, as the API shows it."""
    return TradeOffReport(
        job_id=job.id,
        made_at=now(),
        target=_size(target),
        student=_size(student),
        parameter_share=student.parameters / target.parameters,
        byte_share=student.size_bytes / target.size_bytes,
        recorded_loss=recorded,
        measured_loss=found.loss,
        tasks=list(found.tasks),
        members=found.members,
        non_members=found.non_members,
        leakage=list(found.leakage),
        request=ReportCreate.model_validate(job.request),
    )


def _size(row: ModelRow) -> ModelSize:
    return ModelSize.model_validate({name: getattr(row, name) for name in ModelSize.model_fields})


def finished_report(session: Session, job_id: str) -> TradeOffReport:
    """What a report job found.

    Raises:
        NotFound: there is no such report.
        Conflict: the job has not succeeded.
    """
    row = session.get(JobRow, job_id)
    if row is None or row.kind is not JobKind.REPORT:
        raise NotFound(f"There is no report {job_id!r}.", job=job_id)
    if row.result is None:
        raise Conflict(f"The report {job_id} is {row.state.value}: there is nothing to show; see the job.", job=job_id)
    return TradeOffReport.model_validate(row.result)
