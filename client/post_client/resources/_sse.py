"""A job's history as server-sent events, and what they say about the job."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from urllib.parse import quote

from pydantic import ValidationError

from post_client.http.session import Http
from post_shared.errors import IntegrityError
from post_shared.schemas.jobs import Job, JobEvent, JobState

SILENCE = 45.0
"""Seconds without even a ping, after which a stream counts as broken; the server pings every 15."""
_STREAM = "text/event-stream"

Heard = JobEvent | Job | None
"""An event; the whole job (at the end, and first in a snapshot); or nothing but a sign of life."""


async def stream_events(http: Http, job: str, *, after: int = 0, snapshot: bool = False) -> AsyncIterator[Heard]:
    """What one connection tells, until the job ends. ``snapshot``: the job as it is first, then only what is new.

    Raises:
        Unavailable: the connection broke.
        IntegrityError: the server doesn't stream.
    """
    path = f"/v1/jobs/{quote(job, safe='')}/events"
    place = {"snapshot": "true"} if snapshot else {"after": str(after)}
    async with http.stream("GET", path, params=place, headers={"Accept": _STREAM}, patience=SILENCE) as answer:
        if not answer.headers.get("content-type", "").startswith(_STREAM):
            raise IntegrityError(f"{http.base} doesn't stream events")
        kind, data = "message", ""
        async with aclosing(http.wire.lines(answer)) as lines:  # type: ignore[type-var]
            async for line in lines:
                name, _, value = line.partition(":")
                if not name:
                    heard = _parsed(kind, data) if not line else None
                    kind, data = ("message", "") if not line else (kind, data)
                    yield heard
                elif name == "event":
                    kind = value.strip()
                elif name == "data":
                    data += ("\n" if data else "") + value.removeprefix(" ")


def _parsed(kind: str, data: str) -> Heard:
    try:
        if kind in ("job", "end"):
            return Job.model_validate_json(data, extra="ignore")
        return JobEvent.model_validate_json(data, extra="ignore") if data else None
    except ValidationError:  # a kind of event that this version doesn't know
        return None


def updated(job: Job, heard: Heard) -> Job:
    """The job as it is after an event."""
    if heard is None or isinstance(heard, Job):
        return heard or job
    said = heard.data
    if heard.kind == "state":
        return job.model_copy(update={"state": JobState(said["state"]), "attempt": said.get("attempt", job.attempt)})
    if heard.kind == "progress":
        return job.model_copy(update={"progress": said["progress"], "stage": said["stage"]})
    if heard.kind == "metrics":
        values = {name: value for name, value in said["values"].items() if value is not None}
        return job.model_copy(update={"metrics": job.metrics | values})
    return job
