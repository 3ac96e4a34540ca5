"""``client.evaluations``: evaluate a model on public data."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from post_client.resources._request_bodies import body
from post_client.resources._sync import AsyncResource, Resource, blocking_as, iterating_as
from post_client.resources.jobs import AsyncJob, AsyncJobs, Job
from post_shared.schemas.evaluations import EvaluationCreate
from post_shared.schemas.jobs import Job as JobDocument
from post_shared.schemas.jobs import JobKind
from post_shared.schemas.tasks import TaskSpec


class AsyncEvaluations(AsyncResource):
    """``client.evaluations`` of an :class:`post_client.AsyncClient`"""

    async def create(
        self, /, *, model: str, dataset: str, prompt: str | None = None, task: TaskSpec | None = None, **options: Any
    ) -> AsyncJob:
        """Evaluate a model on a labelled public data set, with a prompt or zero-shot with a task."""
        request = body(EvaluationCreate, model=model, dataset=dataset, prompt=prompt, task=task, **options)
        return AsyncJob(self._http, await self._http.create("/v1/evaluations", request, JobDocument))

    def list(self) -> AsyncIterator[AsyncJob]:
        """Your evaluations, newest first; a provider sees all."""
        return AsyncJobs(self._http).list(kind=JobKind.EVALUATE)


class Evaluations(Resource[AsyncEvaluations]):
    """``client.evaluations``"""

    create = blocking_as(Job, AsyncEvaluations.create)
    list = iterating_as(Job, AsyncEvaluations.list)
