"""Event streams of jobs, which share one query of the database.

A thousand streams must not become a thousand queries: while any stream waits, one poll every moment finds the jobs
that changed, reads their new events once, and passes them to all streams that wait for them.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from post_server.auth.keys import check_still_valid
from post_server.db.database import Database
from post_server.db.tables import JobEventRow, JobRow
from post_server.http.pagination import MAX_LIMIT
from post_server.jobs.service import job_document
from post_server.jobs.states import events_after
from post_shared.errors import PostError
from post_shared.schemas.jobs import Job, JobEvent

POLL_SECONDS = 0.3
News = tuple[Job, list[JobEvent]] | None
"""The job and its new events; None: they are more than a page, so the stream reads them itself."""


@dataclass(eq=False)
class _Wait:
    """One stream that waits for the events of a job after ``after``."""

    job_id: str
    key_id: str
    after: int
    news: asyncio.Future[News] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class EventFeed:
    """All streams of one process that wait for new events of jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waits: set[_Wait] = set()
        self._polling: asyncio.Task[None] | None = None

    async def news(self, job_id: str, key_id: str, after: int) -> News:
        """Wait until the job has events after ``after``, or has ended.

        Raises:
            Unauthenticated: the key isn't valid any more.
        """
        wait = _Wait(job_id, key_id, after)
        self._waits.add(wait)
        if self._polling is None or self._polling.done():
            self._polling = asyncio.ensure_future(self._poll_while_waiting())
        try:
            return await wait.news
        finally:
            self._waits.discard(wait)

    async def _poll_while_waiting(self) -> None:
        """Poll as long as any stream waits."""
        while self._waits:
            await asyncio.sleep(POLL_SECONDS)
            waits = list(self._waits)
            try:
                results = await self._database.run_read(self._poll, waits)
            except Exception as error:  # any error ends the waiting streams, whose callers may reconnect
                results = [(wait, error) for wait in waits]
            for wait, news in results:
                if wait.news.done():
                    continue
                if isinstance(news, Exception):
                    wait.news.set_exception(news)
                else:
                    wait.news.set_result(news)

    def _poll(self, waits: list[_Wait]) -> list[tuple[_Wait, News | Exception]]:
        by_job: dict[str, list[_Wait]] = defaultdict(list)
        with self._database.read() as session:
            refused = _refusals(session, {wait.key_id for wait in waits})
            for wait in waits:
                if wait.key_id not in refused:
                    by_job[wait.job_id].append(wait)
            results: list[tuple[_Wait, News | Exception]] = [
                (wait, refused[wait.key_id]) for wait in waits if wait.key_id in refused
            ]
            for job_id in _changed(session, by_job):
                results += _news_of(session, job_id, by_job[job_id])
        return results


async def get_event_feed(request: Request) -> EventFeed:
    """The feed of this process, made by :func:`post_server.api.app.create_app`."""
    return cast(EventFeed, request.app.state.event_feed)


Feed = Annotated[EventFeed, Depends(get_event_feed)]


def _refusals(session: Session, key_ids: Iterable[str]) -> dict[str, PostError]:
    refused: dict[str, PostError] = {}
    for key_id in key_ids:
        try:
            check_still_valid(session, key_id)
        except PostError as error:
            refused[key_id] = error
    return refused


def _changed(session: Session, by_job: dict[str, list[_Wait]]) -> list[str]:
    """The jobs that ended, or have an event that a waiting stream hasn't sent."""
    changed: list[str] = []
    ids = list(by_job)
    for start in range(0, len(ids), 500):  # databases limit the number of parameters
        chunk = ids[start : start + 500]
        states = select(JobRow.id, JobRow.state).where(JobRow.id.in_(chunk))
        ended = {job_id for job_id, state in session.execute(states) if state.ended}
        last = select(JobEventRow.job_id, func.max(JobEventRow.sequence)).where(JobEventRow.job_id.in_(chunk))
        new = {
            job_id
            for job_id, sequence in session.execute(last.group_by(JobEventRow.job_id))
            if sequence > min(wait.after for wait in by_job[job_id])
        }
        changed += [job_id for job_id in chunk if job_id in ended | new]
    return changed


def _news_of(session: Session, job_id: str, waits: list[_Wait]) -> list[tuple[_Wait, News | Exception]]:
    """The job is read before its events, so that no event written before the job ended is missed."""
    job = job_document(session.get_one(JobRow, job_id, populate_existing=True))
    events = events_after(session, job_id, min(wait.after for wait in waits), MAX_LIMIT)
    if len(events) == MAX_LIMIT:
        return [(wait, None) for wait in waits]
    results: list[tuple[_Wait, News | Exception]] = []
    for wait in waits:
        new = [event for event in events if event.sequence > wait.after]
        if new or job.state.ended:
            results.append((wait, (job, new)))
    return results
