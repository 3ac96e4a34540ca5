"""Long work at the provider, and the verbs that start it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from post_client._http import Http, parse
from post_shared.errors import Cancelled, InvalidInput, JobFailed, Timeout, Unavailable
from post_shared.report_schemas import ReportCreate, ReportTask, TradeOffReport
from post_shared.schemas import (
    DistillationCreate,
    Document,
    EvaluationCreate,
    JobEvent,
    JobKind,
    JobState,
    TaskForm,
    TransferCreate,
)
from post_shared.schemas import Job as JobDocument

D = TypeVar("D", bound=Document)
JobProgress = Callable[[JobDocument], None]
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 2.0
PATIENCE = 120.0
"""How long :meth:`Job.wait` stands a server that is away, in seconds."""


def _ignore(document: JobDocument) -> None: ...


class Job:
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

    def refresh(self) -> Job:
        """Ask the server how it stands."""
        self.document = self._http.get(f"/v1/jobs/{quote(self.id, safe='')}", JobDocument)
        return self

    def cancel(self) -> Job:
        """Ask the server to stop it. A job that ended stays as it ended."""
        path = f"/v1/jobs/{quote(self.id, safe='')}/cancel"
        self.document = parse(self._http.send("POST", path, repeat=True), JobDocument)
        return self

    def events(self, *, after: int = 0, follow: bool = False) -> Iterator[JobEvent]:
        """Its history after event number ``after``; with ``follow`` also what comes, until it ends."""
        return Jobs(self._http).events(self.id, after=after, follow=follow)

    def wait(self, *, progress: JobProgress = _ignore, timeout: float | None = None) -> Job:
        """Wait until it succeeded; ``progress`` hears every change.

        Raises:
            JobFailed: it failed; the message is the server's.
            Cancelled: someone cancelled it.
            Timeout: it still runs after ``timeout`` seconds (and goes on running).
        """
        started = heard = time.monotonic()
        pause, last = FIRST_PAUSE, None
        while True:
            if self.document != last:
                progress(self.document)
                last, pause = self.document, FIRST_PAUSE
            if self.state.ended:
                return self._ended()
            if timeout is not None and time.monotonic() - started > timeout:
                raise Timeout(f"{self.document.kind} {self.id} still runs after {timeout:.0f} s; it was left running")
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_PAUSE)
            try:
                self.refresh()
                heard = time.monotonic()
            except Unavailable:
                if time.monotonic() - heard > PATIENCE:
                    raise

    def _ended(self) -> Job:
        if self.state is JobState.FAILED:
            problem = self.document.error
            detail = problem.detail if problem else "the server gave no reason"
            code = problem.code if problem else None
            raise JobFailed(f"{self.document.kind} {self.id} failed: {detail}", job_id=self.id, cause=code)
        if self.state is JobState.CANCELLED:
            raise Cancelled(f"{self.document.kind} {self.id} was cancelled", job_id=self.id)
        return self


class Jobs:
    """``client.jobs``"""

    def __init__(self, http: Http) -> None:
        self._http = http

    def get(self, job: str) -> Job:
        """One job, by id."""
        return Job(self._http, self._http.get(f"/v1/jobs/{quote(job, safe='')}", JobDocument))

    def list(self, *, kind: JobKind | str | None = None, state: JobState | str | None = None) -> Iterator[Job]:
        """Your jobs, newest first; a provider sees all."""
        params = {"kind": str(kind) if kind else None, "state": str(state) if state else None}
        return (Job(self._http, document) for document in self._http.pages("/v1/jobs", JobDocument, **params))

    def events(self, job: str, *, after: int = 0, follow: bool = False) -> Iterator[JobEvent]:
        """A job's history after event number ``after``."""
        path = f"/v1/jobs/{quote(job, safe='')}/events"
        if not follow:
            yield from self._http.pages(path, JobEvent, after=after)
            return
        failures = 0
        while True:
            try:
                for event in self._stream(path, after):
                    after, failures = event.sequence, 0
                    yield event
                return
            except Unavailable:
                failures += 1
                if failures > 5:
                    raise
                time.sleep(failures)

    def _stream(self, path: str, after: int) -> Iterator[JobEvent]:
        """Server-sent events; the stream ends with the job."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        with self._http.stream("GET", path, params={"after": after}, headers=headers) as answer:
            data: list[str] = []
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    data.append(line[5:].strip())
                elif not line and data:
                    text, data = "\n".join(data), []
                    event = _event(text)
                    if event is not None and event.sequence > after:
                        yield event


def _event(text: str) -> JobEvent | None:
    try:
        return JobEvent.model_validate(json.loads(text), extra="ignore")
    except (ValueError, ValidationError):  # a comment or another kind of event
        return None


class Distillations:
    """``client.distillations`` (provider)"""

    def __init__(self, http: Http) -> None:
        self._http = http

    def create(self, *, target: str, name: str, corpus: Sequence[str], **options: Any) -> Job:
        """Distil a student called ``name``; options as in :class:`post_shared.schemas.DistillationCreate`."""
        body = _body(DistillationCreate, target=target, name=name, corpus=list(corpus), **options)
        return Job(self._http, self._http.create("/v1/distillations", body, JobDocument))

    def list(self) -> Iterator[Job]:
        return Jobs(self._http).list(kind=JobKind.DISTIL)


class Transfers:
    """``client.transfers``"""

    def __init__(self, http: Http) -> None:
        self._http = http

    def create(
        self, *, prompt: str, target: str, dataset: str, alpha: float | Literal["auto"] | None = None, **options: Any
    ) -> Job:
        """Move a source prompt to a target model; options as in :class:`post_shared.schemas.TransferCreate`."""
        if alpha is not None:
            options["alpha"] = alpha
        body = _body(TransferCreate, prompt=prompt, target=target, dataset=dataset, **options)
        return Job(self._http, self._http.create("/v1/transfers", body, JobDocument))

    def list(self) -> Iterator[Job]:
        return Jobs(self._http).list(kind=JobKind.TRANSFER)


class Evaluations:
    """``client.evaluations``"""

    def __init__(self, http: Http) -> None:
        self._http = http

    def create(
        self, *, model: str, dataset: str, prompt: str | None = None, task: TaskForm | None = None, **options: Any
    ) -> Job:
        """Measure a model on a labelled public data set, with a prompt or with a task alone."""
        body = _body(EvaluationCreate, model=model, dataset=dataset, prompt=prompt, task=task, **options)
        return Job(self._http, self._http.create("/v1/evaluations", body, JobDocument))

    def list(self) -> Iterator[Job]:
        return Jobs(self._http).list(kind=JobKind.EVALUATE)


class Reports:
    """``client.reports`` (provider)"""

    def __init__(self, http: Http) -> None:
        self._http = http

    def create(
        self,
        *,
        student: str,
        tasks: Mapping[str, TaskForm],
        members: Sequence[str],
        non_members: Sequence[str],
        **options: Any,
    ) -> Job:
        """Compare a student with its target: ``tasks`` by the name of their public data set, text that was trained on
        and text that wasn't. Options as in :class:`post_shared.report_schemas.ReportCreate`."""
        body = _body(
            ReportCreate,
            student=student,
            tasks=[ReportTask(dataset=dataset, task=form) for dataset, form in tasks.items()],
            members=list(members),
            non_members=list(non_members),
            **options,
        )
        return Job(self._http, self._http.create("/v1/reports", body, JobDocument))

    def get(self, report: str) -> TradeOffReport:
        """A finished report, by the id of its job."""
        return self._http.get(f"/v1/reports/{quote(report, safe='')}", TradeOffReport)

    def list(self) -> Iterator[Job]:
        return Jobs(self._http).list(kind=JobKind.REPORT)


def _body(document: type[D], **members: Any) -> D:
    try:
        return document(**members)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"{where}: {first['msg']}") from error
