"""Jobs: queue a request, find a job, build its document."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from post_server.auth.audit_log import record
from post_server.auth.keys import check_scope
from post_server.db.database import guard
from post_server.db.tables import ApiKeyRow, JobRow
from post_server.jobs.queue import device_for
from post_server.jobs.states import ENDED, announce
from post_server.settings import Settings
from post_shared.errors import NotFound, TooManyRequests
from post_shared.schemas.common import Document, Role
from post_shared.schemas.job_metrics import MetricPoint
from post_shared.schemas.jobs import Job, JobEvent, JobKind
from post_shared.schemas.keys import Scope

Request = TypeVar("Request", bound=Document)
Check = Callable[[Session, ApiKeyRow, Request], None]
"""Raises an error if the caller may not use what a request names, or if its parts don't fit together."""
_BY_ID = select(JobRow).where(JobRow.id == bindparam("job"))
"""Built once, since it runs very often."""


def queue_job(
    session: Session, caller: ApiKeyRow, kind: JobKind, request: Request, check: Check[Request], settings: Settings
) -> JobRow:
    """Check a request against the database and queue it as a job of the caller. Notify workers after the commit.

    Raises:
        TooManyRequests: the caller has too many unfinished jobs.
        PostError: whatever ``check`` raises.
    """
    guard(session)  # what ``check`` finds (a free name, a prompt) stays true until the job is queued
    active = session.scalar(
        select(func.count()).select_from(JobRow).where(JobRow.owner_key_id == caller.id, JobRow.state.not_in(ENDED))
    )
    if (active or 0) >= settings.jobs_per_key:
        raise TooManyRequests(f"You have {active} jobs that have not ended; wait for one, or cancel one.")
    check(session, caller, request)
    row = JobRow(
        kind=kind,
        owner_key_id=caller.id,
        request=request.model_dump(mode="json"),
        priority=caller.job_priority,
        device=device_for(kind, settings),
    )
    announce(session, row)
    record(session, caller.id, f"{kind}.create", row.id)
    return row


def check_may_create(caller: ApiKeyRow, kind: JobKind) -> None:
    """Raise :class:`Forbidden` if the caller's key may not create, and so not cancel, jobs of this kind."""
    check_scope(caller, Scope.PROVIDE if kind in (JobKind.DISTIL, JobKind.REPORT) else Scope.TRANSFER)


def visible_job(session: Session, caller: ApiKeyRow, job_id: str) -> JobRow:
    """The job, if it is the caller's or the caller is the provider.

    Raises:
        NotFound: there is no such job, or it belongs to another key (the error doesn't tell which).
    """
    row = session.scalar(_BY_ID, {"job": job_id})
    if row is None or (caller.role is not Role.PROVIDER and row.owner_key_id != caller.id):
        raise NotFound(f"There is no job {job_id!r}.", job=job_id)
    return row


def job_document(row: JobRow) -> Job:
    """The API document of a job row."""
    members = {name: getattr(row, name) for name in Job.model_fields}
    members["metrics"] = {name: value for name, value in row.metrics.items() if value is not None}
    return Job.model_validate(members)


def metric_series(events: Iterable[JobEvent], names: set[str] | None = None) -> dict[str, list[MetricPoint]]:
    """The series in a job's ``metrics`` events: all, or those in ``names``. NaN and infinite values are left out."""
    series: dict[str, list[MetricPoint]] = {}
    for event in events:
        at = {"sequence": event.sequence, "at": event.at, "stage": event.data["stage"], "step": event.data["step"]}
        for name, value in event.data["values"].items():
            if value is not None and (names is None or name in names):
                series.setdefault(name, []).append(MetricPoint(**at, value=value))
    return series
