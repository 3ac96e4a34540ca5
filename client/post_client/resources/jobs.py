"""``client.jobs``: inspect, follow, await and cancel jobs at the provider."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any, Self
from urllib.parse import quote

from post_client.http.responses import parse
from post_client.http.session import Http
from post_client.http.transports import run
from post_client.resources._sse import stream_events, updated
from post_client.resources._sync import AsyncResource, Resource, blocking, blocking_as, iterating, iterating_as
from post_shared.errors import Cancelled, IntegrityError, JobFailed, Timeout, Unavailable
from post_shared.schemas.job_metrics import JobMetrics
from post_shared.schemas.jobs import Job as JobDocument
from post_shared.schemas.jobs import JobEvent, JobKind, JobState

Kinds = JobKind | str | Sequence[JobKind | str]
States = JobState | str | Sequence[JobState | str]
JobProgress = Callable[[JobDocument], None]
MIN_PAUSE, MAX_PAUSE = 0.2, 2.0
MAX_OUTAGE = 120.0
"""Seconds for which :meth:`Job.wait` tolerates an unavailable server."""
_MAX_BROKEN_STREAMS = 3
"""After this many broken streams in a row, a wait polls instead."""
_POLL_BEFORE_DEADLINE = 20.0
"""Seconds before a deadline from which a wait polls: a stream may be silent for almost that long."""


def _ignore(document: JobDocument) -> None: ...


class AsyncJob:
    """A job at the provider. ``document`` is its last known state."""

    def __init__(self, http: Http, document: JobDocument) -> None:
        self._http = http
        self.document = document

    @property
    def id(self) -> str:
        return self.document.id

    @property
    def state(self) -> JobState:
        return self.document.state

    @property
    def result(self) -> dict[str, Any]:
        """The job's result; empty until the job succeeds."""
        return self.document.result or {}

    async def refresh(self) -> Self:
        """Fetch the job's current state."""
        self.document = await self._http.get(f"/v1/jobs/{quote(self.id, safe='')}", JobDocument)
        return self

    async def cancel(self) -> Self:
        """Ask the server to cancel the job. A job that has ended doesn't change."""
        path = f"/v1/jobs/{quote(self.id, safe='')}/cancel"
        self.document = parse(await self._http.send("POST", path, idempotent=True), JobDocument)
        return self

    def events(self, *, after: int = 0, follow: bool = False) -> AsyncIterator[JobEvent]:
        """The job's events after number ``after``; with ``follow`` also new ones, until the job ends."""
        return AsyncJobs(self._http).events(self.id, after=after, follow=follow)

    async def metrics(self, *, name: str | Sequence[str] | None = None) -> JobMetrics:
        """The metrics so far, as series."""
        return await AsyncJobs(self._http).metrics(self.id, name=name)

    async def wait(self, *, progress: JobProgress = _ignore, timeout: float | None = None) -> Self:
        """Wait until the job succeeds. ``progress`` is called with the job's document at every change.

        Raises:
            JobFailed: the job failed; the message is the server's.
            Cancelled: someone cancelled the job.
            Timeout: it is still running after ``timeout`` seconds; it keeps running.
            Unavailable: the server was unavailable for :data:`MAX_OUTAGE` seconds.
        """
        waiter = _Waiter(self, self._http, progress, timeout)
        waiter.update(self.document)
        while not self.state.ended:
            if waiter.can_stream():
                await waiter.stream()
            else:
                await waiter.poll()
        self._check_success()
        return self

    def _check_success(self) -> None:
        if self.state is JobState.FAILED:
            problem = self.document.error
            detail = problem.detail if problem else "the server gave no reason"
            code = problem.code if problem else None
            raise JobFailed(f"{self.document.kind} {self.id} failed: {detail}", job_id=self.id, cause=code)
        if self.state is JobState.CANCELLED:
            raise Cancelled(f"{self.document.kind} {self.id} was cancelled", job_id=self.id)


class _Waiter:
    """One wait for a job, by its stream of events or, where that fails, by polling."""

    def __init__(self, job: AsyncJob, http: Http, progress: JobProgress, timeout: float | None) -> None:
        self.job, self.http, self.progress, self.timeout = job, http, progress, timeout
        self.started = self.last_contact = time.monotonic()
        self.pause, self.broken_streams = MIN_PAUSE, 0
        self.last_document: JobDocument | None = None

    def update(self, document: JobDocument) -> None:
        """Report a change to ``progress``.

        Raises:
            Timeout: the timeout has passed.
        """
        self.job.document = document
        if document != self.last_document:
            self.last_document, self.pause = document, MIN_PAUSE
            self.progress(document)
        if self._seconds_left() < 0 and not document.state.ended:
            raise Timeout(f"{document.kind} {document.id} still runs after {self.timeout:.0f} s; it keeps running")

    def can_stream(self) -> bool:
        return self.broken_streams < _MAX_BROKEN_STREAMS and self._seconds_left() > _POLL_BEFORE_DEADLINE

    async def stream(self) -> None:
        """Follow the stream until the job ends or the stream breaks."""
        try:
            async with aclosing(stream_events(self.http, self.job.id, snapshot=True)) as stream:  # type: ignore[type-var]
                async for item in stream:
                    if item is not None:
                        self.broken_streams = 0
                    self.last_contact = time.monotonic()
                    self.update(updated(self.job.document, item))
                    if self.job.state.ended and isinstance(item, JobDocument):
                        return
                    if not self.can_stream():
                        break
            self.broken_streams += 1  # the stream ended without the final document
        except Unavailable as error:
            if isinstance(error, Timeout) and self._seconds_left() < 0:
                raise
            self.broken_streams += 1
        except IntegrityError:
            self.broken_streams = _MAX_BROKEN_STREAMS
        await self.poll()

    async def poll(self) -> None:
        """Pause, then fetch the job."""
        await self.http.wire.sleep(min(self.pause, max(0.0, self._seconds_left())))
        self.pause = min(self.pause * 1.5, MAX_PAUSE)
        try:
            await self.job.refresh()
            self.last_contact = time.monotonic()
        except Unavailable:
            if time.monotonic() - self.last_contact > MAX_OUTAGE:
                raise
        self.update(self.job.document)

    def _seconds_left(self) -> float:
        return float("inf") if self.timeout is None else self.started + self.timeout - time.monotonic()


class Job(Resource[AsyncJob]):
    """A job at the provider. ``document`` is its last known state."""

    @property
    def document(self) -> JobDocument:
        return self._async.document

    @property
    def id(self) -> str:
        return self._async.id

    @property
    def state(self) -> JobState:
        return self._async.state

    @property
    def result(self) -> dict[str, Any]:
        """The job's result; empty until the job succeeds."""
        return self._async.result

    def refresh(self) -> Self:
        """Fetch the job's current state."""
        run(self._async.refresh())
        return self

    def cancel(self) -> Self:
        """Ask the server to cancel the job. A job that has ended doesn't change."""
        run(self._async.cancel())
        return self

    events = iterating(AsyncJob.events)
    metrics = blocking(AsyncJob.metrics)

    def wait(self, *, progress: JobProgress = _ignore, timeout: float | None = None) -> Self:
        """Wait until the job succeeds; see :meth:`AsyncJob.wait`."""
        run(self._async.wait(progress=progress, timeout=timeout))
        return self


class AsyncJobs(AsyncResource):
    """``client.jobs`` of an :class:`post_client.AsyncClient`"""

    async def get(self, job: str) -> AsyncJob:
        """One job, by id."""
        return AsyncJob(self._http, await self._http.get(f"/v1/jobs/{quote(job, safe='')}", JobDocument))

    async def list(
        self,
        *,
        kind: Kinds | None = None,
        state: States | None = None,
        since: datetime | None = None,
        before: datetime | None = None,
    ) -> AsyncIterator[AsyncJob]:
        """Your jobs, newest first; a provider sees all. ``since`` and ``before`` need a time zone."""
        params = {
            "kind": _strings(kind),
            "state": _strings(state),
            "since": since.isoformat() if since else None,
            "before": before.isoformat() if before else None,
        }
        async for document in self._http.pages("/v1/jobs", JobDocument, **params):
            yield AsyncJob(self._http, document)

    async def metrics(self, job: str, *, name: str | Sequence[str] | None = None) -> JobMetrics:
        """A job's metrics so far, as series."""
        path, metrics = f"/v1/jobs/{quote(job, safe='')}/metrics", JobMetrics(job_id=job, series={})
        cursor: str | None = None
        while True:
            page = await self._http.get(path, JobMetrics, name=_strings(name), cursor=cursor)
            for series, points in page.series.items():
                metrics.series.setdefault(series, []).extend(points)
            cursor = page.next_cursor
            if cursor is None:
                return metrics

    async def events(self, job: str, *, after: int = 0, follow: bool = False) -> AsyncIterator[JobEvent]:
        """A job's events after number ``after``; with ``follow`` also new ones, until the job ends."""
        if not follow:
            async for event in self._http.pages(f"/v1/jobs/{quote(job, safe='')}/events", JobEvent, after=after):
                yield event
            return
        failures = 0
        while True:
            try:
                async with aclosing(stream_events(self._http, job, after=after)) as stream:  # type: ignore[type-var]
                    async for item in stream:
                        if isinstance(item, JobEvent) and item.sequence > after:
                            after, failures = item.sequence, 0
                            yield item
                return
            except Unavailable:
                failures += 1
                if failures > 5:
                    raise
                await self._http.wire.sleep(failures)


def _strings(value: str | Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    return [value] if isinstance(value, str) else [str(each) for each in value]


class Jobs(Resource[AsyncJobs]):
    """``client.jobs``"""

    get = blocking_as(Job, AsyncJobs.get)
    list = iterating_as(Job, AsyncJobs.list)
    metrics = blocking(AsyncJobs.metrics)
    events = iterating(AsyncJobs.events)
