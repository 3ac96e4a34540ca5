"""A job's history as server-sent events, and how each event updates the job."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from urllib.parse import quote

from pydantic import ValidationError

from post_client.http.session import Http
from post_shared.errors import IntegrityError
from post_shared.schemas.jobs import Job, JobEvent, JobState

READ_TIMEOUT = 45.0
"""A stream is broken after this many seconds without even a ping; the server pings every 15 s."""
_STREAM = "text/event-stream"

StreamItem = JobEvent | Job | None
"""An event; the whole job (last, and first in a snapshot); None for a ping."""


async def stream_events(http: Http, job: str, *, after: int = 0, snapshot: bool = False) -> AsyncIterator[StreamItem]:
    """The items of one connection, until the job ends. With ``snapshot``: the current job, then only new events.

    Raises:
        Unavailable: the connection broke.
        IntegrityError: the server doesn't stream.
    """
    path = f"/v1/jobs/{quote(job, safe='')}/events"
    params = {"snapshot": "true"} if snapshot else {"after": str(after)}
    headers = {"Accept": _STREAM}
    async with http.stream("GET", path, params=params, headers=headers, read_timeout=READ_TIMEOUT) as response:
        if not response.headers.get("content-type", "").startswith(_STREAM):
            raise IntegrityError(f"{http.base} doesn't stream events")
        kind, data = "message", ""
        async with aclosing(http.wire.lines(response)) as lines:  # type: ignore[type-var]
            async for line in lines:
                name, _, value = line.partition(":")
                if not name:
                    item = _parse(kind, data) if not line else None
                    kind, data = ("message", "") if not line else (kind, data)
                    yield item
                elif name == "event":
                    kind = value.strip()
                elif name == "data":
                    data += ("\n" if data else "") + value.removeprefix(" ")


def _parse(kind: str, data: str) -> StreamItem:
    try:
        if kind in ("job", "end"):
            return Job.model_validate_json(data, extra="ignore")
        return JobEvent.model_validate_json(data, extra="ignore") if data else None
    except ValidationError:  # an event kind that this version doesn't know
        return None


def updated(job: Job, item: StreamItem) -> Job:
    """The job after an event."""
    if item is None or isinstance(item, Job):
        return item or job
    data = item.data
    if item.kind == "state":
        return job.model_copy(update={"state": JobState(data["state"]), "attempt": data.get("attempt", job.attempt)})
    if item.kind == "progress":
        return job.model_copy(update={"progress": data["progress"], "stage": data["stage"]})
    if item.kind == "metrics":
        values = {name: value for name, value in data["values"].items() if value is not None}
        return job.model_copy(update={"metrics": job.metrics | values})
    return job
