"""The state transitions of a job row, and who may make them.

    queued ──claim──▶ running ──finish──▶ succeeded
      ▲                │  │ └────fail────▶ failed
      └────release─────┘  └─request_cancel─▶ cancelling ──▶ cancelled

A worker holds a job by a lease and a random token. Its writes name the token in the ``WHERE`` clause, so a worker that
lost the job (paused too long, cut off, delivered twice) changes nothing and gets :class:`LeaseLost`. Each change is
one conditional ``UPDATE``; it also locks the row, so that the events of a job are numbered without gaps.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, bindparam, case, func, null, or_, select, update
from sqlalchemy.orm import Session

from post_server.db.tables import JobEventRow, JobRow, now
from post_shared.errors import Conflict, NotFound, PostError, WorkerLost
from post_shared.schemas.jobs import JobEvent, JobState

ENDED = [state for state in JobState if state.ended]


HELD = (JobState.RUNNING, JobState.CANCELLING)
_CANCEL_TRIES = 5
_EVENTS = (  # built once, and of plain columns: no row objects to track
    select(*(getattr(JobEventRow, name) for name in JobEvent.model_fields))
    .where(JobEventRow.job_id == bindparam("job"), JobEventRow.sequence > bindparam("after"))
    .order_by(JobEventRow.sequence)
    .limit(bindparam("limit"))
)
_EVENTS_OF_KIND = _EVENTS.where(JobEventRow.kind == bindparam("kind"))


class LeaseLost(Exception):
    """Another worker holds the job, or it has ended: stop working on it and write nothing."""


@dataclass(frozen=True)
class Lease:
    """The right to write to a job until another worker claims it."""

    job_id: str
    token: str


def free(max_attempts: int) -> ColumnElement[bool]:
    """Whether a job may be claimed: it is queued, or its lease ran out and it has an attempt left."""
    lost = and_(JobRow.state == JobState.RUNNING, JobRow.lease_until < now(), JobRow.attempt < max_attempts)
    return or_(and_(JobRow.state == JobState.QUEUED, JobRow.queued_at <= now()), lost)


# --- by the worker that holds the job -----------------------------------------------------------------


def claim(session: Session, job_id: str, *, lease_seconds: float, max_attempts: int) -> tuple[JobRow, Lease] | None:
    """Claim a queued job, or a running one whose lease ran out; None if it can't be claimed."""
    at, token = now(), secrets.token_hex(16)
    claimed = _update(
        session,
        and_(JobRow.id == job_id, free(max_attempts)),
        state=JobState.RUNNING,
        attempt=JobRow.attempt + 1,
        lease_losses=JobRow.lease_losses + case((JobRow.state == JobState.RUNNING, 1), else_=0),
        token=token,
        lease_until=at + timedelta(seconds=lease_seconds),
        heartbeat_at=at,
        started_at=func.coalesce(JobRow.started_at, at),
    )
    if not claimed:
        return None
    row = _fresh(session, job_id)
    _append(session, job_id, "state", {"state": JobState.RUNNING, "attempt": row.attempt})
    return row, Lease(job_id, token)


def heartbeat(session: Session, lease: Lease, *, lease_seconds: float) -> JobState:
    """Renew the lease; the returned state shows whether a cancel was requested."""
    at = now()
    _fenced(session, lease, heartbeat_at=at, lease_until=at + timedelta(seconds=lease_seconds))
    return _fresh(session, lease.job_id).state


def held_state(session: Session, lease: Lease) -> JobState:
    """The job's state, without a write, as long as the lease holds; else :class:`LeaseLost`."""
    mine = and_(JobRow.id == lease.job_id, JobRow.token == lease.token, JobRow.state.in_(HELD))
    state = session.scalar(select(JobRow.state).where(mine))
    if state is None:
        raise LeaseLost(lease.job_id)
    return state


def last_event(session: Session, job_id: str) -> int:
    """The sequence number of the job's newest event, which grows as long as it makes progress."""
    return session.scalar(select(func.max(JobEventRow.sequence)).where(JobEventRow.job_id == job_id)) or 0


def record_progress(
    session: Session,
    lease: Lease,
    *,
    progress: float,
    stage: str,
    step: int,
    steps: int,
    metrics: Mapping[str, float],
    step_seconds: float | None = None,
) -> None:
    """Write the progress into the row, and append events for those who follow the job."""
    row = _fenced(session, lease, progress=min(1.0, max(0.0, progress)), stage=stage[:64])
    position = {"stage": stage, "step": step}
    pace = {} if step_seconds is None else {"step_seconds": round(step_seconds, 6)}
    _append(session, lease.job_id, "progress", {"progress": round(progress, 4), **position, "steps": steps, **pace})
    if metrics:
        row.metrics = {**row.metrics, **metrics}
        _append(session, lease.job_id, "metrics", {**position, "values": dict(metrics)})


def finish(session: Session, lease: Lease, result: Mapping[str, Any]) -> None:
    """The job has succeeded. Add its new rows in the same transaction: all are written, or nothing."""
    _end(session, lease, JobState.SUCCEEDED, result=dict(result), progress=1.0)


def fail(session: Session, lease: Lease, error: PostError) -> None:
    """The job has failed, and trying again would not help."""
    _end(session, lease, JobState.FAILED, error=error.problem())


def cancel(session: Session, lease: Lease) -> None:
    """The job has stopped because a cancel was requested."""
    _end(session, lease, JobState.CANCELLED)


def release(
    session: Session, lease: Lease, *, reason: str, give_attempt_back: bool = False, pause_seconds: float = 0.0
) -> None:
    """Put a running job back into the queue, claimable after a pause; a cancelling one becomes cancelled instead."""
    row = _fenced(session, lease, heartbeat_at=now())
    if row.state is JobState.CANCELLING:
        cancel(session, lease)
        return
    attempt = max(0, row.attempt - 1) if give_attempt_back else row.attempt
    _requeue(session, and_(JobRow.id == lease.job_id, JobRow.token == lease.token), attempt, pause_seconds)
    _append(session, lease.job_id, "state", {"state": JobState.QUEUED, "attempt": attempt, "reason": reason})


# --- by anyone ----------------------------------------------------------------------------------------


def announce(session: Session, row: JobRow) -> None:
    """Add a new job and its first event."""
    session.add(row)
    session.flush()
    _append(session, row.id, "state", {"state": JobState.QUEUED, "attempt": 0})


def request_cancel(session: Session, job_id: str) -> JobRow:
    """Request that a job stops: a queued one ends immediately, a running one soon, an ended one doesn't change.

    Raises:
        NotFound: there is no such job.
    """
    for _ in range(_CANCEL_TRIES):  # the state may change between two reads, but not forever
        at, this_job = now(), JobRow.id == job_id
        cancelled: dict[str, Any] = {"state": JobState.CANCELLED, "cancel_requested_at": at, "finished_at": at}
        cancelling: dict[str, Any] = {"state": JobState.CANCELLING, "cancel_requested_at": at}
        for state, values in ((JobState.QUEUED, cancelled), (JobState.RUNNING, cancelling)):
            if _update(session, and_(this_job, JobRow.state == state), **values):
                _append(session, job_id, "state", {"state": values["state"]})
                return _fresh(session, job_id)
        row = _fresh(session, job_id)
        if row.state.ended or row.state is JobState.CANCELLING:
            return row
    return row


def prioritise(session: Session, job_id: str, priority: int) -> JobRow:
    """Change the priority of a queued job.

    Raises:
        NotFound: there is no such job.
        Conflict: it isn't queued any more.
    """
    if not _update(session, and_(JobRow.id == job_id, JobRow.state == JobState.QUEUED), priority=priority):
        raise Conflict(f"The job {job_id} is {_fresh(session, job_id).state}; only a queued job's priority can change.")
    return _fresh(session, job_id)


def requeue(session: Session, job_id: str) -> JobRow:
    """Queue a failed or cancelled job again, with all its attempts. Notify the workers after the commit.

    Raises:
        NotFound: there is no such job.
        Conflict: it has not ended, or it succeeded.
    """
    ended = and_(JobRow.id == job_id, JobRow.state.in_((JobState.FAILED, JobState.CANCELLED)))
    fresh: dict[str, Any] = {"error": null(), "result": null(), "metrics": {}, "progress": 0.0, "stage": None}
    if not _update(session, ended, **fresh, finished_at=None, cancel_requested_at=None):
        state = _fresh(session, job_id).state
        raise Conflict(f"The job {job_id} is {state}; only a failed or cancelled one can be queued again.")
    _requeue(session, JobRow.id == job_id, 0)
    _append(session, job_id, "state", {"state": JobState.QUEUED, "attempt": 0, "reason": "requeued"})
    return _fresh(session, job_id)


def events_after(session: Session, job_id: str, after: int, limit: int, kind: str | None = None) -> list[JobEvent]:
    """A job's events after a sequence number, oldest first: all of them, or one kind."""
    parameters = {"job": job_id, "after": after, "limit": limit}
    if kind is None:
        rows = session.execute(_EVENTS, parameters)
    else:
        rows = session.execute(_EVENTS_OF_KIND, parameters | {"kind": kind})
    return [JobEvent(**row) for row in rows.mappings()]


# --- by the reconciler --------------------------------------------------------------------------------


def expired(session: Session) -> list[JobRow]:
    """Jobs whose worker is silent: the lease ran out."""
    return list(session.scalars(select(JobRow).where(JobRow.state.in_(HELD), JobRow.lease_until < now())))


def take_back(session: Session, job_id: str, token: str | None, *, max_attempts: int) -> JobState | None:
    """End the lease of a lost worker: queue the job again, or end it; None if it wasn't lost after all."""
    where = and_(JobRow.id == job_id, JobRow.token == token, JobRow.state.in_(HELD), JobRow.lease_until < now())
    if not _update(session, where, lease_losses=JobRow.lease_losses + 1):  # locks the row
        return None
    row, lease = _fresh(session, job_id), Lease(job_id, str(token))
    if row.state is JobState.CANCELLING:
        cancel(session, lease)
    elif row.attempt >= max_attempts:
        fail(session, lease, WorkerLost(f"its worker went silent {row.attempt} times; see the workers' logs"))
    else:
        release(session, lease, reason="worker_lost")
    return _fresh(session, job_id).state


def overdue(seconds: float) -> ColumnElement[bool]:
    """Whether a job has been queued for longer than ``seconds``."""
    return and_(JobRow.state == JobState.QUEUED, JobRow.queued_at <= now() - timedelta(seconds=seconds))


# --- the conditional update ---------------------------------------------------------------------------


def _update(session: Session, where: ColumnElement[bool], **values: Any) -> bool:
    statement = update(JobRow).where(where).values(**values).execution_options(synchronize_session=False)
    return bool(session.execute(statement).rowcount)  # type: ignore[attr-defined]


def _fenced(session: Session, lease: Lease, **values: Any) -> JobRow:
    mine = and_(JobRow.id == lease.job_id, JobRow.token == lease.token, JobRow.state.in_(HELD))
    if not _update(session, mine, **values):
        raise LeaseLost(lease.job_id)
    return _fresh(session, lease.job_id)


def _end(session: Session, lease: Lease, state: JobState, **values: Any) -> None:
    row = _fenced(session, lease, state=state, finished_at=now(), token=None, lease_until=None, **values)
    _append(session, lease.job_id, "state", {"state": state, "attempt": row.attempt})


def _requeue(session: Session, where: ColumnElement[bool], attempt: int, pause_seconds: float = 0.0) -> None:
    at = now() + timedelta(seconds=pause_seconds)
    _update(session, where, state=JobState.QUEUED, queued_at=at, attempt=attempt, token=None, lease_until=None)


def _fresh(session: Session, job_id: str) -> JobRow:
    row = session.get(JobRow, job_id, populate_existing=True)
    if row is None:
        raise NotFound(f"There is no job {job_id!r}.", job=job_id)
    return row


def _append(session: Session, job_id: str, kind: str, data: Mapping[str, Any]) -> None:
    session.flush()
    session.add(JobEventRow(job_id=job_id, sequence=last_event(session, job_id) + 1, kind=kind, data=dict(data)))
    session.flush()
