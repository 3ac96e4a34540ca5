"""``/v1/jobs``: the state of jobs, and their events as pages or as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query
from pydantic import AfterValidator, AwareDatetime, BeforeValidator
from sqlalchemy import func, select
from sse_starlette import EventSourceResponse, ServerSentEvent

from post_server.auth.audit_log import record
from post_server.auth.keys import check_still_valid
from post_server.db.tables import ApiKeyRow, JobEventRow, JobRow
from post_server.http.dependencies import AnyCaller, App, Caller, Context
from post_server.http.pagination import MAX_LIMIT, Paging, paginate
from post_server.http.problems import problems
from post_server.http.routing import Route
from post_server.jobs.event_stream import EventFeed, Feed, News
from post_server.jobs.service import check_may_create, job_document, metric_series, visible_job
from post_server.jobs.states import events_after, request_cancel
from post_shared.errors import InvalidInput, Unauthenticated
from post_shared.schemas.common import Page, Role
from post_shared.schemas.job_metrics import JobMetrics
from post_shared.schemas.jobs import Job, JobEvent, JobKind, JobState

router = APIRouter(route_class=Route, prefix="/v1/jobs", tags=["jobs"])


def _check_date_format(value: object) -> object:
    """A bare number would be read as seconds since 1970, which the API doesn't document."""
    if isinstance(value, str) and not any(letter in value for letter in "-T:"):
        raise ValueError("a date and time with its offset, as 2026-01-31T08:00:00Z")
    return value


def _to_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("a date and time between the years 1 and 9999, in UTC too") from None


Moment = Annotated[AwareDatetime, BeforeValidator(_check_date_format), AfterValidator(_to_utc)]

JobId = Annotated[str, Path(min_length=1, max_length=64)]
Sequence = Annotated[int, Query(ge=0, le=2**31 - 1, description="Events after this sequence number.")]
Cursor = Annotated[
    str | None, Query(pattern=r"^[0-9]{1,10}$", max_length=10, description="`next_cursor` of the page before.")
]
_PING_SECONDS = 15
_STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}


@router.get("", responses=problems())
def list_jobs(
    app: App,
    caller: Caller,
    paging: Paging,
    kind: Annotated[list[JobKind] | None, Query(max_length=10, description="Only these kinds.")] = None,
    state: Annotated[list[JobState] | None, Query(max_length=10, description="Only these states.")] = None,
    since: Annotated[Moment | None, Query(description="Only those created then or later.")] = None,
    before: Annotated[Moment | None, Query(description="Only those created earlier.")] = None,
) -> Page[Job]:
    """The caller's jobs (a provider's: all), newest first."""
    filters = {
        "owner_key_id": None if caller.role is Role.PROVIDER else [caller.id],
        "kind": kind,
        "state": state,
    }
    conditions = [getattr(JobRow, name).in_(values) for name, values in filters.items() if values]
    conditions += [] if since is None else [JobRow.created_at >= since]
    conditions += [] if before is None else [JobRow.created_at < before]
    with app.database.read() as session:
        return paginate(session, select(JobRow).where(*conditions), JobRow, paging, job_document)


@router.get("/{job}", responses=problems(404))
def get_job(app: App, caller: Caller, job: JobId) -> Job:
    """One job."""
    with app.database.read() as session:
        return job_document(visible_job(session, caller, job))


@router.post("/{job}/cancel", responses=problems(404))
def cancel_job(app: App, caller: AnyCaller, job: JobId) -> Job:
    """Ask a job to stop. A queued one ends at once, a running one soon; an ended one stays as it is."""
    with app.database.write() as session:
        check_may_create(caller, visible_job(session, caller, job).kind)
        record(session, caller.id, "job.cancel", job)
        return job_document(request_cancel(session, job))


@router.get("/{job}/metrics", responses=problems(404))
def get_job_metrics(
    app: App,
    caller: Caller,
    job: JobId,
    name: Annotated[list[str] | None, Query(max_length=20, description="Only these series.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Steps that have metrics.")] = 1000,
    cursor: Cursor = None,
) -> JobMetrics:
    """A job's metrics as series, oldest first."""
    after = _position(cursor, 0)
    with app.database.read() as session:
        visible_job(session, caller, job)
        rows = events_after(session, job, after, limit + 1, kind="metrics")
    last = rows[limit - 1].sequence if len(rows) > limit else None
    series = metric_series(rows[:limit], None if name is None else set(name))
    return JobMetrics(job_id=job, series=series, next_cursor=None if last is None else str(last))


@router.get(
    "/{job}/events",
    response_model=Page[JobEvent],
    responses=problems(404) | {200: {"description": "A page, or with `Accept: text/event-stream` a stream"} | _STREAM},
)
async def get_job_events(
    app: App,
    feed: Feed,
    caller: Caller,
    job: JobId,
    after: Sequence = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = MAX_LIMIT,
    cursor: Cursor = None,
    accept: Annotated[str, Header()] = "application/json",
    last_event_id: Annotated[str | None, Header(max_length=100)] = None,
    snapshot: Annotated[bool, Query(description="Streams only: first an event `job`, then only new events.")] = False,
) -> Any:
    """A job's events, oldest first. A stream ends with the job; each event's id is its sequence number."""
    if "text/event-stream" not in accept:
        return await app.database.run_read(_page, app, caller, job, _position(cursor, after), limit)
    await app.database.run_read(_job_and_events, app, caller, job, 0, 1)  # an error is a problem document, not a stream
    start = None if snapshot and not last_event_id else _position(last_event_id, after)
    events = _follow(app, feed, caller, job, start)
    return EventSourceResponse(events, ping=_PING_SECONDS, headers={"Cache-Control": "no-store"})


async def _follow(
    app: Context, feed: EventFeed, caller: ApiKeyRow, job_id: str, after: int | None
) -> AsyncIterator[ServerSentEvent]:
    """Every event after ``after``, as it occurs; when the job ends, one event ``end`` with its document.

    Without ``after``: one event ``job`` with its document, then the events that follow. The stream also ends when the
    caller's key is revoked or expires.
    """
    last = after or 0
    news: News = None
    if after is None:
        last, document = await app.database.run_read(_snapshot, app, caller, job_id)
        yield ServerSentEvent(data=document.model_dump_json(), event="job", sep="\n")
    while True:
        try:
            if news is None:
                news = await app.database.run_read(_job_and_events, app, caller, job_id, last, MAX_LIMIT)
            job, events = news
            for event in events:
                last = event.sequence
                yield ServerSentEvent(data=event.model_dump_json(), event=event.kind, id=str(last), sep="\n")
            if len(events) < MAX_LIMIT and job.state.ended:
                yield ServerSentEvent(data=job.model_dump_json(), event="end", sep="\n")
                return
            news = await feed.news(job_id, caller.id, last) if len(events) < MAX_LIMIT else None
        except Unauthenticated:
            return


def _job_and_events(app: Context, caller: ApiKeyRow, job_id: str, after: int, limit: int) -> tuple[Job, list[JobEvent]]:
    """The job is read before its events, so that no event written before the job ended is missed."""
    with app.database.read() as session:
        check_still_valid(session, caller.id)
        job = job_document(visible_job(session, caller, job_id))
        return job, events_after(session, job_id, after, limit)


def _snapshot(app: Context, caller: ApiKeyRow, job_id: str) -> tuple[int, Job]:
    """The last sequence number is read before the job: what the job doesn't show yet will be an event."""
    with app.database.read() as session:
        last = session.scalar(select(func.max(JobEventRow.sequence)).where(JobEventRow.job_id == job_id))
        return last or 0, job_document(visible_job(session, caller, job_id))


def _page(app: Context, caller: ApiKeyRow, job_id: str, after: int, limit: int) -> Page[JobEvent]:
    with app.database.read() as session:
        visible_job(session, caller, job_id)
        events = events_after(session, job_id, after, limit + 1)
    more = len(events) > limit
    return Page(items=events[:limit], next_cursor=str(events[limit - 1].sequence) if more else None)


def _position(text: str | None, default: int) -> int:
    if text is None or text == "":
        return default
    if not (text.isascii() and text.isdigit()) or int(text) > 2**31 - 1:
        raise InvalidInput("A position in the events is the sequence number of an event.")
    return int(text)
