"""``client.transfers``: transfer prompts to target models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from post_client.resources._request_bodies import body, values
from post_client.resources._sync import AsyncResource, Resource, blocking_as, iterating_as
from post_client.resources.jobs import AsyncJob, AsyncJobs, Job
from post_shared.schemas.jobs import Job as JobDocument
from post_shared.schemas.jobs import JobKind
from post_shared.schemas.transfers import TransferCreate, TransferOptions


class AsyncTransfers(AsyncResource):
    """``client.transfers`` of an :class:`post_client.AsyncClient`"""

    async def create(
        self,
        /,
        *,
        prompt: str,
        target: str,
        dataset: str,
        options: TransferOptions | None = None,
        **changes: Any,
    ) -> AsyncJob:
        """Transfer a source prompt to a target model. ``changes`` are settings of :class:`TransferOptions` that
        override ``options``."""
        request = body(TransferCreate, prompt=prompt, target=target, dataset=dataset, **values(options, changes))
        return AsyncJob(self._http, await self._http.create("/v1/transfers", request, JobDocument))

    def list(self) -> AsyncIterator[AsyncJob]:
        """Your transfers, newest first; a provider sees all."""
        return AsyncJobs(self._http).list(kind=JobKind.TRANSFER)


class Transfers(Resource[AsyncTransfers]):
    """``client.transfers``"""

    create = blocking_as(Job, AsyncTransfers.create)
    list = iterating_as(Job, AsyncTransfers.list)
