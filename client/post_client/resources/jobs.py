"""Long work at the provider: look at it, follow it, wait for it, stop it."""

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
from post_client.resources._sync import AsyncNoun, Noun, blocking, blocking_as, iterating, iterating_as
from post_shared.errors import Cancelled, IntegrityError, JobFailed, Timeout, Unavailable
from post_shared.schemas.job_metrics import JobMetrics
from post_shared.schemas.jobs import Job as JobDocument
from post_shared.schemas.jobs import JobEvent, JobKind, JobState

Kinds = JobKind | str | Sequence[JobKind | str]
States = JobState | str | Sequence[JobState | str]
JobProgress = Callable[[JobDocument], None]
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 2.0
PATIENCE = 120.0
"""How long :meth:`Job.wait` stands a server that is away, in seconds."""
_BREAKS = 3
"""So many broken streams in a row, and asking now and then must do."""
_PRECISE = 20.0
"""Seconds before a deadline at which a wait asks instead of listening: a stream may be silent for almost so long."""


def _ignore(document: JobDocument) -> None: ...


class AsyncJob:
    """A job at the provider. ``document`` is what was last heard of it."""

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
        """What came out. Empty until the job succeeded."""
        return self.document.result or {}

    async def refresh(self) -> Self:
        """Ask the server how it stands."""
        self.document = await self._http.get(f"/v1/jobs/{quote(self.id, safe='')}", JobDocument)
        return self

    async def cancel(self) -> Self:
        """Ask the server to stop it. A job that ended stays as it ended."""
        path = f"/v1/jobs/{quote(self.id, safe='')}/cancel"
        self.document = parse(await self._http.send("POST", path, repeat=True), JobDocument)
        return self

    def events(self, *, after: int = 0, follow: bool = False) -> AsyncIterator[JobEvent]:
        """Its history after event number ``after``; with ``follow`` also what comes, until it ends."""
        return AsyncJobs(self._http).events(self.id, after=after, follow=follow)

    async def metrics(self, *, name: str | Sequence[str] | None = None) -> JobMetrics:
        """What it measured so far, as series."""
        return await AsyncJobs(self._http).metrics(self.id, name=name)

    async def wait(self, *, progress: JobProgress = _ignore, timeout: float | None = None) -> Self:
        """Wait until it succeeded; ``progress`` hears every change, as it happens where the server streams events.

        Raises:
            JobFailed: it failed; the message is the server's.
            Cancelled: someone cancelled it.
            Timeout: it still runs after ``timeout`` seconds (and goes on running).
        """
        watch = _Watch(self, self._http, progress, timeout)
        watch.show(self.document)
        while not self.state.ended:
            if watch.may_listen():
                await watch.listen()
            else:
                await watch.ask()
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


class _Watch:
    """One wait for a job: a stream of events while that works, asking now and then where it doesn't."""

    def __init__(self, job: AsyncJob, http: Http, progress: JobProgress, timeout: float | None) -> None:
        self.job, self.http, self.progress, self.timeout = job, http, progress, timeout
        self.started = self.heard = time.monotonic()
        self.pause, self.breaks = FIRST_PAUSE, 0
        self.shown: JobDocument | None = None

    def show(self, document: JobDocument) -> None:
        """Pass a change on.

        Raises:
            Timeout: there is no time left.
        """
        self.job.document = document
        if document != self.shown:
            self.shown, self.pause = document, FIRST_PAUSE
            self.progress(document)
        if self._left() < 0 and not document.state.ended:
            raise Timeout(f"{document.kind} {document.id} still runs after {self.timeout:.0f} s; it was left running")

    def may_listen(self) -> bool:
        return self.breaks < _BREAKS and self._left() > _PRECISE

    async def listen(self) -> None:
        """Follow the stream to the job's end, or until it breaks."""
        try:
            async with aclosing(stream_events(self.http, self.job.id, snapshot=True)) as stream:  # type: ignore[type-var]
                async for heard in stream:
                    if heard is not None:
                        self.breaks = 0
                    self.heard = time.monotonic()
                    self.show(updated(self.job.document, heard))
                    if self.job.state.ended and isinstance(heard, JobDocument):
                        return
                    if not self.may_listen():
                        break
            self.breaks += 1  # it ended without the job's last word
        except Unavailable as error:
            if isinstance(error, Timeout) and self._left() < 0:
                raise
            self.breaks += 1
        except IntegrityError:
            self.breaks = _BREAKS
        await self.ask()

    async def ask(self) -> None:
        """Look at the job after a pause."""
        await self.http.wire.sleep(min(self.pause, max(0.0, self._left())))
        self.pause = min(self.pause * 1.5, LONGEST_PAUSE)
        try:
            await self.job.refresh()
            self.heard = time.monotonic()
        except Unavailable:
            if time.monotonic() - self.heard > PATIENCE:
                raise
        self.show(self.job.document)

    def _left(self) -> float:
        return float("inf") if self.timeout is None else self.started + self.timeout - time.monotonic()


class Job(Noun[AsyncJob]):
    """A job at the provider. ``document`` is what was last heard of it."""

    @property
    def document(self) -> JobDocument:
        return self._verbs.document

    @property
    def id(self) -> str:
        return self._verbs.id

    @property
    def state(self) -> JobState:
        return self._verbs.state

    @property
    def result(self) -> dict[str, Any]:
        """What came out. Empty until the job succeeded."""
        return self._verbs.result

    def refresh(self) -> Self:
        """Ask the server how it stands."""
        run(self._verbs.refresh())
        return self

    def cancel(self) -> Self:
        """Ask the server to stop it. A job that ended stays as it ended."""
        run(self._verbs.cancel())
        return self

    events = iterating(AsyncJob.events)
    metrics = blocking(AsyncJob.metrics)

    def wait(self, *, progress: JobProgress = _ignore, timeout: float | None = None) -> Self:
        """Wait until it succeeded; see :meth:`AsyncJob.wait`."""
        run(self._verbs.wait(progress=progress, timeout=timeout))
        return self


class AsyncJobs(AsyncNoun):
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
        """Your jobs, newest first; a provider sees all. Times need their zone."""
        params = {
            "kind": _words(kind),
            "state": _words(state),
            "since": since.isoformat() if since else None,
            "before": before.isoformat() if before else None,
        }
        async for document in self._http.pages("/v1/jobs", JobDocument, **params):
            yield AsyncJob(self._http, document)

    async def metrics(self, job: str, *, name: str | Sequence[str] | None = None) -> JobMetrics:
        """What a job measured so far, as series."""
        path, whole = f"/v1/jobs/{quote(job, safe='')}/metrics", JobMetrics(job_id=job, series={})
        cursor: str | None = None
        while True:
            page = await self._http.get(path, JobMetrics, name=_words(name), cursor=cursor)
            for series, points in page.series.items():
                whole.series.setdefault(series, []).extend(points)
            cursor = page.next_cursor
            if cursor is None:
                return whole

    async def events(self, job: str, *, after: int = 0, follow: bool = False) -> AsyncIterator[JobEvent]:
        """A job's history after event number ``after``; with ``follow`` also what comes, until it ends."""
        if not follow:
            async for event in self._http.pages(f"/v1/jobs/{quote(job, safe='')}/events", JobEvent, after=after):
                yield event
            return
        failures = 0
        while True:
            try:
                async with aclosing(stream_events(self._http, job, after=after)) as stream:  # type: ignore[type-var]
                    async for heard in stream:
                        if isinstance(heard, JobEvent) and heard.sequence > after:
                            after, failures = heard.sequence, 0
                            yield heard
                return
            except Unavailable:
                failures += 1
                if failures > 5:
                    raise
                await self._http.wire.sleep(failures)


def _words(given: str | Sequence[str] | None) -> list[str] | None:
    if given is None:
        return None
    return [given] if isinstance(given, str) else [str(each) for each in given]


class Jobs(Noun[AsyncJobs]):
    """``client.jobs``"""

    get = blocking_as(Job, AsyncJobs.get)
    list = iterating_as(Job, AsyncJobs.list)
    metrics = blocking(AsyncJobs.metrics)
    events = iterating(AsyncJobs.events)
