"""The verbs that start long work at the provider."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote

from post_client.resources._blocking import AsyncNoun, Noun, blocking, blocking_as, iterating_as
from post_client.resources._bodies import body
from post_client.resources.jobs import AsyncJob, AsyncJobs, Job
from post_shared.report_schemas import ReportCreate, ReportTask, TradeOffReport
from post_shared.schemas import (
    DistillationCreate,
    EvaluationCreate,
    JobKind,
    TaskForm,
    TransferCreate,
)
from post_shared.schemas import Job as JobDocument


class AsyncDistillations(AsyncNoun):
    """``client.distillations`` of an :class:`post_client.AsyncClient` (provider)"""

    async def create(self, /, *, target: str, name: str, corpus: Sequence[str], **options: Any) -> AsyncJob:
        """Distil a student called ``name``; options as in :class:`post_shared.schemas.DistillationCreate`."""
        order = body(DistillationCreate, target=target, name=name, corpus=list(corpus), **options)
        return AsyncJob(self._http, await self._http.create("/v1/distillations", order, JobDocument))

    def list(self) -> AsyncIterator[AsyncJob]:
        """Your distillations, newest first; a provider sees all."""
        return AsyncJobs(self._http).list(kind=JobKind.DISTIL)


class Distillations(Noun[AsyncDistillations]):
    """``client.distillations`` (provider)"""

    create = blocking_as(Job, AsyncDistillations.create)
    list = iterating_as(Job, AsyncDistillations.list)


class AsyncTransfers(AsyncNoun):
    """``client.transfers`` of an :class:`post_client.AsyncClient`"""

    async def create(
        self, /, *, prompt: str, target: str, dataset: str, alpha: float | Literal["auto"] | None = None, **options: Any
    ) -> AsyncJob:
        """Move a source prompt to a target model; options as in :class:`post_shared.schemas.TransferCreate`."""
        if alpha is not None:
            options["alpha"] = alpha
        order = body(TransferCreate, prompt=prompt, target=target, dataset=dataset, **options)
        return AsyncJob(self._http, await self._http.create("/v1/transfers", order, JobDocument))

    def list(self) -> AsyncIterator[AsyncJob]:
        """Your transfers, newest first; a provider sees all."""
        return AsyncJobs(self._http).list(kind=JobKind.TRANSFER)


class Transfers(Noun[AsyncTransfers]):
    """``client.transfers``"""

    create = blocking_as(Job, AsyncTransfers.create)
    list = iterating_as(Job, AsyncTransfers.list)


class AsyncEvaluations(AsyncNoun):
    """``client.evaluations`` of an :class:`post_client.AsyncClient`"""

    async def create(
        self, /, *, model: str, dataset: str, prompt: str | None = None, task: TaskForm | None = None, **options: Any
    ) -> AsyncJob:
        """Measure a model on a labelled public data set, with a prompt or with a task alone."""
        order = body(EvaluationCreate, model=model, dataset=dataset, prompt=prompt, task=task, **options)
        return AsyncJob(self._http, await self._http.create("/v1/evaluations", order, JobDocument))

    def list(self) -> AsyncIterator[AsyncJob]:
        """Your evaluations, newest first; a provider sees all."""
        return AsyncJobs(self._http).list(kind=JobKind.EVALUATE)


class Evaluations(Noun[AsyncEvaluations]):
    """``client.evaluations``"""

    create = blocking_as(Job, AsyncEvaluations.create)
    list = iterating_as(Job, AsyncEvaluations.list)


class AsyncReports(AsyncNoun):
    """``client.reports`` of an :class:`post_client.AsyncClient` (provider)"""

    async def create(
        self,
        /,
        *,
        student: str,
        tasks: Mapping[str, TaskForm],
        members: Sequence[str],
        non_members: Sequence[str],
        **options: Any,
    ) -> AsyncJob:
        """Compare a student with its target: ``tasks`` by the name of their public data set, text that was trained on
        and text that wasn't. Options as in :class:`post_shared.report_schemas.ReportCreate`."""
        order = body(
            ReportCreate,
            student=student,
            tasks=[ReportTask(dataset=dataset, task=form) for dataset, form in tasks.items()],
            members=list(members),
            non_members=list(non_members),
            **options,
        )
        return AsyncJob(self._http, await self._http.create("/v1/reports", order, JobDocument))

    async def get(self, report: str) -> TradeOffReport:
        """A finished report, by the id of its job."""
        return await self._http.get(f"/v1/reports/{quote(report, safe='')}", TradeOffReport)

    def list(self) -> AsyncIterator[AsyncJob]:
        """Your reports, newest first; a provider sees all."""
        return AsyncJobs(self._http).list(kind=JobKind.REPORT)


class Reports(Noun[AsyncReports]):
    """``client.reports`` (provider)"""

    create = blocking_as(Job, AsyncReports.create)
    get = blocking(AsyncReports.get)
    list = iterating_as(Job, AsyncReports.list)
