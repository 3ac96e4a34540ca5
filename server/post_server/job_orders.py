"""Orders for long work: what a request must name and fit before it becomes a queued job."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from post_server.audit_log import record
from post_server.database import guard
from post_server.dataset_store import check_labelled, find_dataset
from post_server.jobs.queue import device_for
from post_server.jobs.states import announce
from post_server.keys import check_scope
from post_server.model_store import find_model
from post_server.prompt_store import ENDED, visible_prompt
from post_server.records import ApiKeyRow, JobRow, ModelRow, PromptRow
from post_server.reports import check_report
from post_server.settings import Settings
from post_shared.errors import Conflict, InvalidInput, NotFound, PromptMismatch, TooManyRequests
from post_shared.job_schemas import MetricPoint
from post_shared.key_schemas import Scope
from post_shared.report_schemas import ReportCreate
from post_shared.schemas import (
    DistillationCreate,
    EvaluationCreate,
    Job,
    JobEvent,
    JobKind,
    ModelRole,
    PromptRole,
    Role,
    TaskForm,
    TransferCreate,
)
from post_shared.tasks import Task

Order = DistillationCreate | TransferCreate | EvaluationCreate | ReportCreate
_BY_ID = select(JobRow).where(JobRow.id == bindparam("job"))
"""Made once: it is asked very often."""


def place_order(session: Session, caller: ApiKeyRow, order: Order, settings: Settings) -> JobRow:
    """Check an order against what is there and queue it as a job of the caller. Ring the doorbell after the commit.

    Raises:
        NotFound: something that it names isn't there for this caller.
        InvalidInput, PromptMismatch: the parts don't fit together.
        Conflict: the student's name is taken.
        TooManyRequests: the caller has too many jobs that have not ended.
    """
    guard(session)  # a name that is free, a prompt that is there: they stay so until the order stands
    active = session.scalar(
        select(func.count()).select_from(JobRow).where(JobRow.owner_key_id == caller.id, JobRow.state.not_in(ENDED))
    )
    if (active or 0) >= settings.jobs_per_key:
        raise TooManyRequests(f"You have {active} jobs that have not ended; wait for one, or cancel one.")
    if isinstance(order, DistillationCreate):
        kind = JobKind.DISTIL
        _check_distillation(session, order)
    elif isinstance(order, TransferCreate):
        kind = JobKind.TRANSFER
        _check_transfer(session, caller, order)
    elif isinstance(order, ReportCreate):
        kind = JobKind.REPORT
        check_report(session, order)
    else:
        kind = JobKind.EVALUATE
        _check_evaluation(session, caller, order)
    row = JobRow(
        kind=kind,
        owner_key_id=caller.id,
        request=order.model_dump(mode="json"),
        priority=caller.job_priority,
        device=device_for(kind, settings),
    )
    announce(session, row)
    record(session, caller.id, f"{kind}.order", row.id)
    return row


def check_may_order(caller: ApiKeyRow, kind: JobKind) -> None:
    """Raise :class:`Forbidden` when the caller's key may not order, and so not cancel, jobs of the kind."""
    check_scope(caller, Scope.PROVIDE if kind in (JobKind.DISTIL, JobKind.REPORT) else Scope.TRANSFER)


def visible_job(session: Session, caller: ApiKeyRow, job_id: str) -> JobRow:
    """The job, if it is the caller's or the caller is the provider.

    Raises:
        NotFound: there is none, or it belongs to someone else (the answer doesn't tell which).
    """
    row = session.scalar(_BY_ID, {"job": job_id})
    if row is None or (caller.role is not Role.PROVIDER and row.owner_key_id != caller.id):
        raise NotFound(f"There is no job {job_id!r}.", job=job_id)
    return row


def job_document(row: JobRow) -> Job:
    """The row as the API shows it."""
    members = {name: getattr(row, name) for name in Job.model_fields}
    members["metrics"] = {name: value for name, value in row.metrics.items() if value is not None}
    return Job.model_validate(members)


def metric_series(events: Iterable[JobEvent], wanted: set[str] | None = None) -> dict[str, list[MetricPoint]]:
    """The series in a job's ``metrics`` events: all, or the wanted ones. What was no number is left out."""
    series: dict[str, list[MetricPoint]] = {}
    for event in events:
        at = {"sequence": event.sequence, "at": event.at, "stage": event.data["stage"], "step": event.data["step"]}
        for name, value in event.data["values"].items():
            if value is not None and (wanted is None or name in wanted):
                series.setdefault(name, []).append(MetricPoint(**at, value=value))
    return series


def check_prompt_fits(prompt: PromptRow, model: ModelRow) -> None:
    """The prompt's vectors can stand before the model's.

    Raises:
        PromptMismatch: another width, or a target prompt of another model.
    """
    if prompt.width != model.hidden_size:
        raise PromptMismatch(
            f"The prompt is {prompt.width} wide, the model {model.name} {model.hidden_size}.",
            width=prompt.width,
            hidden_size=model.hidden_size,
        )
    if prompt.role is PromptRole.TARGET and prompt.model_hash != model.hash:
        raise PromptMismatch(f"The prompt {prompt.id} was made for another model than {model.name}.")


def check_task(prompt: PromptRow | None, task: TaskForm | None) -> None:
    """There is exactly one task, and it can be used.

    Raises:
        InvalidInput: neither a prompt nor a task, or both.
        TaskInvalid: the task has a mistake.
    """
    if (prompt is None) == (task is None):
        raise InvalidInput("Give either a prompt, which carries its task, or a task.")
    if task is not None:
        Task.from_form(task)


def _check_distillation(session: Session, order: DistillationCreate) -> None:
    target = find_model(session, order.target, ModelRole.TARGET)
    for reference in order.corpus:
        find_dataset(session, reference)
    _check_layers(order, target)
    if session.scalar(select(ModelRow.id).where(ModelRow.name == order.name)) is not None:
        raise Conflict(f"There already is a model named {order.name!r}; choose another name.")
    pending = select(JobRow).where(JobRow.kind == JobKind.DISTIL, JobRow.state.not_in(ENDED))
    for job in session.scalars(pending):
        if job.request.get("name") == order.name:
            raise Conflict(f"The job {job.id} is making a student named {order.name!r}.", job=job.id)


def _check_layers(order: DistillationCreate, target: ModelRow) -> None:
    """A student has some of the target's layers, never all: with all of them it would be the target."""
    kept = order.keep_layers
    count = kept if isinstance(kept, int) else len(kept)
    if not 1 <= count < target.layers:
        raise InvalidInput(
            f"A student can't keep {count} of the {target.layers} layers of {target.name}: give keep_layers "
            f"(--keep-layers) from 1 to {target.layers - 1}."
        )
    if not isinstance(kept, int) and (kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= target.layers):
        raise InvalidInput(f"keep_layers lists each layer once, in order, from 0 to {target.layers - 1}.")
    if not isinstance(kept, int) and order.layer_pattern != "front":
        raise InvalidInput(
            "layer_pattern (--layer-pattern) spreads a number of layers; keep_layers lists them already."
        )


def _check_transfer(session: Session, caller: ApiKeyRow, order: TransferCreate) -> None:
    prompt = visible_prompt(session, caller, order.prompt)
    target = find_model(session, order.target, ModelRole.TARGET)
    dataset = find_dataset(session, order.dataset)
    if prompt.role is not PromptRole.SOURCE:
        raise PromptMismatch(f"The prompt {prompt.id} is a target prompt already; transfer its source prompt.")
    student = find_model(session, prompt.model_id)
    if student.role is not ModelRole.STUDENT or student.target_id != target.id:
        raise PromptMismatch(f"The prompt {prompt.id} was tuned on {student.name}, not on a student of {target.name}.")
    check_prompt_fits(prompt, target)
    if order.alpha == "auto":
        check_labelled(dataset)


def _check_evaluation(session: Session, caller: ApiKeyRow, order: EvaluationCreate) -> None:
    model = find_model(session, order.model)
    check_labelled(find_dataset(session, order.dataset))
    prompt = None if order.prompt is None else visible_prompt(session, caller, order.prompt)
    check_task(prompt, order.task)
    if prompt is not None:
        check_prompt_fits(prompt, model)
