"""Waiting for a job: by its stream of events, and by polling where there is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from post_client import Client
from post_client.resources.jobs import Job
from post_server.jobs import states
from post_shared.errors import Timeout
from post_shared.schemas.jobs import Job as JobDocument
from post_shared.schemas.jobs import JobState
from tests.server.http_harness import TASK, HttpHarness


class Recording(httpx.BaseTransport):
    """The real network with recorded requests. Event streams are whole, broken or none, by ``streams``."""

    def __init__(self, streams: str) -> None:
        self.streams = streams
        self.requests: list[str] = []
        self._real = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request.url.path.rsplit("/", 1)[-1])
        if not request.url.path.endswith("/events") or self.streams == "whole":
            return self._real.handle_request(request)
        if self.streams == "none":
            return httpx.Response(200, json={"items": [], "next_cursor": None})
        response = self._real.handle_request(request)

        class Cut(httpx.SyncByteStream):
            def __iter__(self) -> Iterator[bytes]:
                yield next(response.iter_raw())
                raise httpx.ReadError("cut", request=request)

        return httpx.Response(response.status_code, headers=response.headers, stream=Cut())

    def close(self) -> None:
        self._real.close()


@pytest.fixture
def job_id(http_harness: HttpHarness) -> str:
    http_harness.add_pair()
    http_harness.add_dataset()
    body = {"model": "large", "dataset": "public", "task": TASK.model_dump()}
    return str(http_harness("alice", "POST", "/v1/evaluations", json=body).json()["id"])


class Worker(threading.Thread):
    """Runs the job. Each step is reported once the client has received the previous one."""

    def __init__(self, http_harness: HttpHarness, job: str) -> None:
        super().__init__(daemon=True)
        self.http_harness, self.job, self.proceed = http_harness, job, threading.Semaphore(0)

    def run(self) -> None:
        self.proceed.acquire(timeout=20)
        with self.http_harness.database.write() as session:
            _, lease = states.claim(session, self.job, lease_seconds=60, max_attempts=3) or pytest.fail("not claimed")
        for step in range(3):
            self.proceed.acquire(timeout=20)
            with self.http_harness.database.write() as session:
                values: dict[str, Any] = {"step": step, "steps": 3, "metrics": {"loss": 1.0 - step}}
                states.record_progress(session, lease, progress=(step + 1) / 4, stage="measure", **values)
        self.proceed.acquire(timeout=20)
        with self.http_harness.database.write() as session:
            states.finish(session, lease, {"accuracy": 0.5})


@pytest.mark.parametrize("streams", ["whole", "broken", "none"])
def test_every_change_is_reported_until_the_result(http_harness: HttpHarness, job_id: str, streams: str) -> None:
    transport, worker, reported = Recording(streams), Worker(http_harness, job_id), list[JobDocument]()

    def progress(document: JobDocument) -> None:
        if not reported or document.progress != reported[-1].progress or document.state != reported[-1].state:
            worker.proceed.release()  # otherwise only a metric is new
        reported.append(document)

    worker.start()
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"], transport=transport) as client:
        job = client.jobs.get(job_id)
        assert job.wait(progress=progress) is job
        assert job.result == {"accuracy": 0.5}
        assert job.document == client.jobs.get(job_id).document
    assert [each.state for each in reported][:2] == [JobState.QUEUED, JobState.RUNNING]
    assert sorted({each.progress for each in reported}) == [0, 0.25, 0.5, 0.75, 1]
    assert {each.progress: each.metrics.get("loss") for each in reported}[0.75] == -1.0
    if streams == "whole":
        assert transport.requests == [job_id, "events", job_id]  # no polling between the first and the last request
    else:
        assert transport.requests.count(job_id) > 2


def test_the_stream_of_an_ended_job_has_its_whole_history(http_harness: HttpHarness, job_id: str) -> None:
    http_harness("alice", "POST", f"/v1/jobs/{job_id}/cancel")
    transport = Recording("whole")
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"], transport=transport) as client:
        assert client.jobs.get(job_id).state is JobState.CANCELLED
        followed = list(client.jobs.get(job_id).events(follow=True))
    assert [event.kind for event in followed] == ["state", "state"]


def test_the_timeout_also_holds_while_a_stream_is_open(
    http_harness: HttpHarness, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("post_client.resources.jobs._POLL_BEFORE_DEADLINE", 0.2)
    monkeypatch.setattr("post_client.resources._sse.READ_TIMEOUT", 0.1)
    started = time.monotonic()
    with (
        Client(url=http_harness.url, api_key=http_harness.keys["alice"]) as client,
        pytest.raises(Timeout, match="still runs"),
    ):
        client.jobs.get(job_id).wait(timeout=0.5)
    assert time.monotonic() - started >= 0.5
    assert http_harness.job(job_id).state is JobState.QUEUED


def test_a_snapshot_starts_with_the_job_and_continues_with_new_events(http_harness: HttpHarness, job_id: str) -> None:
    from post_client.http.transports import run_all
    from post_client.resources._sse import stream_events

    with Client(url=http_harness.url, api_key=http_harness.keys["alice"]) as client:
        http = client._http
        stream = run_all(stream_events(http, job_id, snapshot=True))
        first = next(each for each in stream if each is not None)
        assert isinstance(first, JobDocument)
        assert first.state is JobState.QUEUED
        Job.cancel(client.jobs.get(job_id))
        rest = [each for each in stream if each is not None]
    assert [type(each).__name__ for each in rest] == ["JobEvent", "Job"]
