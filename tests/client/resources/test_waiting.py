"""Waiting for a job: by its stream of events, and without one where there is none."""

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


class Watched(httpx.BaseTransport):
    """The real network; ``streams`` says what becomes of event streams: whole, soon broken, or none."""

    def __init__(self, streams: str) -> None:
        self.streams = streams
        self.asked: list[str] = []
        self._real = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.path.rsplit("/", 1)[-1])
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
def ordered(http_harness: HttpHarness) -> str:
    http_harness.add_pair()
    http_harness.add_dataset()
    order = {"model": "large", "dataset": "public", "task": TASK.model_dump()}
    return str(http_harness("alice", "POST", "/v1/evaluations", json=order).json()["id"])


class Worker(threading.Thread):
    """Runs the job once it may: each step is reported when the one before was heard."""

    def __init__(self, http_harness: HttpHarness, job: str) -> None:
        super().__init__(daemon=True)
        self.http_harness, self.job, self.go_on = http_harness, job, threading.Semaphore(0)

    def run(self) -> None:
        self.go_on.acquire(timeout=20)
        with self.http_harness.database.write() as session:
            _, lease = states.claim(session, self.job, lease_seconds=60, max_attempts=3) or pytest.fail("not claimed")
        for step in range(3):
            self.go_on.acquire(timeout=20)
            with self.http_harness.database.write() as session:
                numbers: dict[str, Any] = {"step": step, "steps": 3, "metrics": {"loss": 1.0 - step}}
                states.record_progress(session, lease, progress=(step + 1) / 4, stage="measure", **numbers)
        self.go_on.acquire(timeout=20)
        with self.http_harness.database.write() as session:
            states.finish(session, lease, {"accuracy": 0.5})


@pytest.mark.parametrize("streams", ["whole", "broken", "none"])
def test_every_change_is_heard_and_the_result_comes(http_harness: HttpHarness, ordered: str, streams: str) -> None:
    transport, worker, heard = Watched(streams), Worker(http_harness, ordered), list[JobDocument]()

    def progress(document: JobDocument) -> None:
        if not heard or document.progress != heard[-1].progress or document.state != heard[-1].state:
            worker.go_on.release()  # otherwise only a metric was new
        heard.append(document)

    worker.start()
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"], transport=transport) as client:
        job = client.jobs.get(ordered)
        assert job.wait(progress=progress) is job
        assert job.result == {"accuracy": 0.5}
        assert job.document == client.jobs.get(ordered).document
    assert [each.state for each in heard][:2] == [JobState.QUEUED, JobState.RUNNING]
    assert sorted({each.progress for each in heard}) == [0, 0.25, 0.5, 0.75, 1]
    assert {each.progress: each.metrics.get("loss") for each in heard}[0.75] == -1.0
    if streams == "whole":
        assert transport.asked == [ordered, "events", ordered]  # nothing was asked for but the stream
    else:
        assert transport.asked.count(ordered) > 2


def test_a_job_that_ended_before_needs_no_stream(http_harness: HttpHarness, ordered: str) -> None:
    http_harness("alice", "POST", f"/v1/jobs/{ordered}/cancel")
    transport = Watched("whole")
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"], transport=transport) as client:
        assert client.jobs.get(ordered).state is JobState.CANCELLED
        followed = list(client.jobs.get(ordered).events(follow=True))
    assert [event.kind for event in followed] == ["state", "state"]


def test_time_runs_out_also_while_a_stream_is_open(
    http_harness: HttpHarness, ordered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("post_client.resources.jobs._PRECISE", 0.2)
    monkeypatch.setattr("post_client.resources._sse.SILENCE", 0.1)
    started = time.monotonic()
    with (
        Client(url=http_harness.url, api_key=http_harness.keys["alice"]) as client,
        pytest.raises(Timeout, match="still runs"),
    ):
        client.jobs.get(ordered).wait(timeout=0.5)
    assert time.monotonic() - started >= 0.5
    assert http_harness.job(ordered).state is JobState.QUEUED


def test_a_snapshot_starts_with_the_job_and_goes_on_with_what_is_new(http_harness: HttpHarness, ordered: str) -> None:
    from post_client.http.transports import run_all
    from post_client.resources._sse import stream_events

    with Client(url=http_harness.url, api_key=http_harness.keys["alice"]) as client:
        http = client._http
        stream = run_all(stream_events(http, ordered, snapshot=True))
        first = next(each for each in stream if each is not None)
        assert isinstance(first, JobDocument)
        assert first.state is JobState.QUEUED
        Job.cancel(client.jobs.get(ordered))
        rest = [each for each in stream if each is not None]
    assert [type(each).__name__ for each in rest] == ["JobEvent", "Job"]
