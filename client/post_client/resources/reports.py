"""``client.reports``: trade-off reports of accuracy and leakage (provider)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from post_client.resources._request_bodies import body
from post_client.resources._sync import AsyncResource, Resource, blocking, blocking_as, iterating_as
from post_client.resources.jobs import AsyncJob, AsyncJobs, Job
from post_shared.schemas.jobs import Job as JobDocument
from post_shared.schemas.jobs import JobKind
from post_shared.schemas.reports import ReportCreate, ReportTask, TradeOffReport
from post_shared.schemas.tasks import TaskSpec


class AsyncReports(AsyncResource):
    """``client.reports`` of an :class:`post_client.AsyncClient` (provider)"""

    async def create(
        self,
        /,
        *,
        student: str,
        tasks: Mapping[str, TaskSpec],
        members: Sequence[str],
        non_members: Sequence[str],
        **options: Any,
    ) -> AsyncJob:
        """Compare a student with its target. ``tasks`` maps labelled public data sets to their tasks; ``members`` were
        trained on, ``non_members`` weren't. Options: :class:`post_shared.schemas.reports.ReportCreate`."""
        request = body(
            ReportCreate,
            student=student,
            tasks=[ReportTask(dataset=dataset, task=task) for dataset, task in tasks.items()],
            members=list(members),
            non_members=list(non_members),
            **options,
        )
        return AsyncJob(self._http, await self._http.create("/v1/reports", request, JobDocument))

    async def get(self, report: str) -> TradeOffReport:
        """A finished report, by the id of its job."""
        return await self._http.get(f"/v1/reports/{quote(report, safe='')}", TradeOffReport)

    def list(self) -> AsyncIterator[AsyncJob]:
        """Your reports, newest first; a provider sees all."""
        return AsyncJobs(self._http).list(kind=JobKind.REPORT)


class Reports(Resource[AsyncReports]):
    """``client.reports`` (provider)"""

    create = blocking_as(Job, AsyncReports.create)
    get = blocking(AsyncReports.get)
    list = iterating_as(Job, AsyncReports.list)
