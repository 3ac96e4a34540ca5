"""What a trade-off report must name and fit before it becomes a queued job."""

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
    """The parts are there and fit together, as far as can be said without reading texts.

    Raises:
        NotFound: no such student or dataset.
        InvalidInput: a task without labels or classes, a dataset named twice, one on both sides of the attack, or
            non-members that the student was distilled on.
    """
    student = find_model(session, request.student, ModelRole.STUDENT)
    if student.target_id is None:
        raise InvalidInput(f"It isn't known which target model {student.name} came from; distil it here.")
    tasks = [_checked_task(session, each) for each in request.tasks]
    if len({row.id for row in tasks}) < len(tasks):
        raise InvalidInput("Each task has a dataset of its own; one is named twice.")
    members = [find_dataset(session, name) for name in request.members]
    others = [find_dataset(session, name) for name in request.non_members]
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
    task = Task.from_spec(wanted.task)
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
