"""``/v1/jobs``: how the work goes, and its history as a list or as it happens."""

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
from post_server.jobs.states import events_behind, request_cancel
from post_shared.errors import InvalidInput, Unauthenticated
from post_shared.schemas.common import Page, Role
from post_shared.schemas.job_metrics import JobMetrics
from post_shared.schemas.jobs import Job, JobEvent, JobKind, JobState

router = APIRouter(route_class=Route, prefix="/v1/jobs", tags=["jobs"])


def _in_words(value: object) -> object:
    """A bare number would be taken for seconds since 1970, which the document doesn't offer."""
    if isinstance(value, str) and not any(letter in value for letter in "-T:"):
        raise ValueError("a date and time with its offset, as 2026-01-31T08:00:00Z")
    return value


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("a date and time between the years 1 and 9999, in UTC too") from None


Moment = Annotated[AwareDatetime, BeforeValidator(_in_words), AfterValidator(_in_utc)]

JobId = Annotated[str, Path(min_length=1, max_length=64)]
Sequence = Annotated[int, Query(ge=0, le=2**31 - 1, description="Events behind this sequence number.")]
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
    since: Annotated[Moment | None, Query(description="Only those made then or later.")] = None,
    before: Annotated[Moment | None, Query(description="Only those made earlier.")] = None,
) -> Page[Job]:
    """The caller's jobs (a provider's: all), newest first."""
    wanted = {
        "owner_key_id": None if caller.role is Role.PROVIDER else [caller.id],
        "kind": kind,
        "state": state,
    }
    conditions = [getattr(JobRow, name).in_(values) for name, values in wanted.items() if values]
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
    limit: Annotated[int, Query(ge=1, le=1000, description="Steps at which something was measured.")] = 1000,
    cursor: Cursor = None,
) -> JobMetrics:
    """What a job measured, as series, oldest first."""
    after = _number(cursor, 0)
    with app.database.read() as session:
        visible_job(session, caller, job)
        rows = events_behind(session, job, after, limit + 1, kind="metrics")
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
    snapshot: Annotated[bool, Query(description="Streams only: first an event `job`, then only what is new.")] = False,
) -> Any:
    """A job's history, oldest first. As a stream it goes on until the job ends; each event's id is its sequence."""
    if "text/event-stream" not in accept:
        return await app.database.look(_page, app, caller, job, _number(cursor, after), limit)
    await app.database.look(_look, app, caller, job, 0, 1)  # a refusal is a problem, not a stream
    events = _follow(app, feed, caller, job, None if snapshot and not last_event_id else _number(last_event_id, after))
    return EventSourceResponse(events, ping=_PING_SECONDS, headers={"Cache-Control": "no-store"})


async def _follow(
    app: Context, feed: EventFeed, caller: ApiKeyRow, job_id: str, after: int | None
) -> AsyncIterator[ServerSentEvent]:
    """Every event behind ``after``, as it comes; at the end of the job one event ``end`` with its document.

    Without ``after``: one event ``job`` with its document, then what comes behind it. The stream also ends when the
    caller's key is revoked or expires.
    """
    place = after or 0
    news: News = None
    if after is None:
        place, document = await app.database.look(_snapshot, app, caller, job_id)
        yield ServerSentEvent(data=document.model_dump_json(), event="job", sep="\n")
    while True:
        try:
            if news is None:
                news = await app.database.look(_look, app, caller, job_id, place, MAX_LIMIT)
            job, events = news
            for event in events:
                place = event.sequence
                yield ServerSentEvent(data=event.model_dump_json(), event=event.kind, id=str(place), sep="\n")
            if len(events) < MAX_LIMIT and job.state.ended:
                yield ServerSentEvent(data=job.model_dump_json(), event="end", sep="\n")
                return
            news = await feed.news(job_id, caller.id, place) if len(events) < MAX_LIMIT else None
        except Unauthenticated:
            return


def _look(app: Context, caller: ApiKeyRow, job_id: str, after: int, limit: int) -> tuple[Job, list[JobEvent]]:
    """The job first and then its events: what was written before the job ended is never missed."""
    with app.database.read() as session:
        check_still_valid(session, caller.id)
        job = job_document(visible_job(session, caller, job_id))
        return job, events_behind(session, job_id, after, limit)


def _snapshot(app: Context, caller: ApiKeyRow, job_id: str) -> tuple[int, Job]:
    """The last sequence number first and then the job: what it doesn't show yet will be an event."""
    with app.database.read() as session:
        last = session.scalar(select(func.max(JobEventRow.sequence)).where(JobEventRow.job_id == job_id))
        return last or 0, job_document(visible_job(session, caller, job_id))


def _page(app: Context, caller: ApiKeyRow, job_id: str, after: int, limit: int) -> Page[JobEvent]:
    with app.database.read() as session:
        visible_job(session, caller, job_id)
        events = events_behind(session, job_id, after, limit + 1)
    more = len(events) > limit
    return Page(items=events[:limit], next_cursor=str(events[limit - 1].sequence) if more else None)


def _number(text: str | None, otherwise: int) -> int:
    if text is None or text == "":
        return otherwise
    if not (text.isascii() and text.isdigit()) or int(text) > 2**31 - 1:
        raise InvalidInput("The place in the history is the sequence number of an event.")
    return int(text)
