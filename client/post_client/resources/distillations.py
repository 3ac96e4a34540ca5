"""``client.distillations``: distil students from targets (provider)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from post_client.resources._request_bodies import body, values
from post_client.resources._sync import AsyncResource, Resource, blocking_as, iterating_as
from post_client.resources.jobs import AsyncJob, AsyncJobs, Job
from post_shared.schemas.distillations import DistillationCreate, DistilOptions
from post_shared.schemas.jobs import Job as JobDocument
from post_shared.schemas.jobs import JobKind


class AsyncDistillations(AsyncResource):
    """``client.distillations`` of an :class:`post_client.AsyncClient` (provider)"""

    async def create(
        self,
        /,
        *,
        target: str,
        name: str,
        corpus: Sequence[str],
        options: DistilOptions | None = None,
        **changes: Any,
    ) -> AsyncJob:
        """Distil a student called ``name``. ``changes`` are settings of :class:`DistilOptions` that override
        ``options``."""
        request = body(DistillationCreate, target=target, name=name, corpus=list(corpus), **values(options, changes))
        return AsyncJob(self._http, await self._http.create("/v1/distillations", request, JobDocument))

    def list(self) -> AsyncIterator[AsyncJob]:
        """Your distillations, newest first; a provider sees all."""
        return AsyncJobs(self._http).list(kind=JobKind.DISTIL)


class Distillations(Resource[AsyncDistillations]):
    """``client.distillations`` (provider)"""

    create = blocking_as(Job, AsyncDistillations.create)
    list = iterating_as(Job, AsyncDistillations.list)
