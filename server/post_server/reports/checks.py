"""Validation of a report request before its job is queued."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.orm import Session

from post_server.datasets.service import check_labelled, find_dataset
from post_server.db.tables import ApiKeyRow, DatasetRow
from post_server.models.service import find_model
from post_server.reports.service import recorded_loss
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput
from post_shared.schemas.models import ModelRole
from post_shared.schemas.reports import RecordedLoss, ReportCreate, ReportTask


def check_report(session: Session, caller: ApiKeyRow, request: ReportCreate) -> None:
    """Check the request against the stored model and datasets, without reading any text.

    Raises:
        NotFound: no such student or dataset.
        InvalidInput: a task without labels or classes, a dataset named twice, one on both sides of the attack, or
            non-members that the student was distilled on.
    """
    student = find_model(session, request.student, ModelRole.STUDENT)
    if student.target_id is None:
        raise InvalidInput(f"The target model of {student.name} is unknown; distil the student here.")
    tasks = [_checked_task(session, task) for task in request.tasks]
    if len({row.id for row in tasks}) < len(tasks):
        raise InvalidInput("Each task needs its own dataset; one is named twice.")
    members = [find_dataset(session, name) for name in request.members]
    others = [find_dataset(session, name) for name in request.non_members]
    both = {row.sha256 for row in members} & {row.sha256 for row in others}
    if both:
        names = ", ".join(sorted(row.name for row in others if row.sha256 in both))
        raise InvalidInput(f"These datasets are both members and non-members: {names}. Name each on one side only.")
    recorded = recorded_loss(session, student)
    if recorded is not None:
        _check_never_seen(session, others, recorded)


def _checked_task(session: Session, report_task: ReportTask) -> DatasetRow:
    row = find_dataset(session, report_task.dataset)
    check_labelled(row)
    task = Task.from_spec(report_task.task)
    if task.is_generation:
        raise InvalidInput(f"The task of {row.name} has no label words; a report needs classification tasks.")
    unknown = sorted(set(row.labels or ()) - set(task.labels))
    if unknown:
        raise InvalidInput(
            f"The dataset {row.name} has labels that its task doesn't have: {', '.join(unknown[:10])}; "
            f"the task's labels are: {', '.join(task.labels)}."
        )
    return row


def _check_never_seen(session: Session, others: Sequence[DatasetRow], recorded: RecordedLoss) -> None:
    references = {row.id for row in others} | {row.name for row in others}
    seen = sorted(references & set(recorded.corpus))
    if seen:
        raise InvalidInput(
            f"The student was distilled on {', '.join(seen)} ({recorded.job_id}), so these can't be non-members."
        )
