"""The report job."""

from __future__ import annotations

from post_server.datasets.service import find_dataset
from post_server.db.tables import ModelRow
from post_server.jobs.context import JobContext, Outcome
from post_server.models.service import find_model
from post_server.reports.service import recorded_loss, report_document
from post_server.reports.texts import attacked_texts, split_task
from post_server.reports.trade_off import trade_off
from post_shared.data.tasks import Task
from post_shared.schemas.models import ModelRole
from post_shared.schemas.reports import ReportCreate


def run_report(context: JobContext) -> Outcome:
    """Compare a student with its target: accuracy on public tasks, and membership leakage."""
    request = ReportCreate.model_validate(context.job.request)
    with context.database.read() as session:
        student = find_model(session, request.student, ModelRole.STUDENT)
        source = session.get_one(ModelRow, student.target_id)
        task_rows = [find_dataset(session, task.dataset) for task in request.tasks]
        members, others = (
            [find_dataset(session, name) for name in names] for names in (request.members, request.non_members)
        )
        recorded = recorded_loss(session, student)
    specs = [Task.from_spec(task.task) for task in request.tasks]
    tasks = [split_task(row.name, task, context.rows(row), request) for row, task in zip(task_rows, specs, strict=True)]
    target = context.load(source)
    seen, unseen = ([text for row in side for text in context.texts(row)] for side in (members, others))
    result = trade_off(
        target,
        context.load(student),
        tasks,
        *attacked_texts(target, seen, unseen, request),
        request,
        on_progress=context.on_progress,
        checkpoint=context.checkpoint,
        checkpoint_seconds=context.settings.checkpoint_seconds,
    )
    document = report_document(context.job, source, student, recorded, result)
    return lambda session: document.model_dump(mode="json")
