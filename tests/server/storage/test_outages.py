"""Services that are unreachable, full or hanging: the job waits or fails with advice, and leaves nothing half done."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from redis import Redis

from post_server.jobs import notifier, states
from post_server.storage.blob_store import BlobStore
from post_server.worker.exit_codes import PASSING, STORAGE_AWAY
from post_server.worker.supervisor import JobSupervisor
from post_shared.schemas.jobs import JobState
from tests.server.external_services import LOOPBACK, ObjectStore, free_port
from tests.server.server_harness import ServerHarness, job_processes, wait_for

ENDLESS = 10_000_000


@pytest.fixture
def small_work_folder(server_harness: ServerHarness) -> Iterator[Path]:
    """The jobs' work folder, on a file system that is too small for a model."""
    folder = server_harness.settings.home / "work"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def supervisor(server_harness: ServerHarness) -> JobSupervisor:
    return JobSupervisor(server_harness.settings, server_harness.database, threading.Event())


def states_of(server_harness: ServerHarness, job_id: str) -> list[str]:
    return [event.data["state"] for event in server_harness.events(job_id) if event.kind == "state"]


def test_a_full_disk_fails_the_job_with_advice_and_leaves_no_files(
    ready: ServerHarness, small_work_folder: Path
) -> None:
    job_id, before = ready.add_distil(steps=3), ready.store.list()
    supervisor(ready).run(job_id)
    row = ready.job(job_id)
    assert (row.state, row.attempt) == (JobState.FAILED, 1), (row.error, ready.log())
    assert row.error is not None
    assert row.error["code"] == "disk_full"
    assert "POST_HOME" in row.error["detail"]
    assert ready.store.list() == before
    assert not list(small_work_folder.iterdir())
    subprocess.run(["mount", "-o", "remount,size=20m", small_work_folder], check=True)
    again = ready.add_distil(steps=3)
    supervisor(ready).run(again)
    assert ready.job(again).state is JobState.SUCCEEDED


@pytest.mark.slow
def test_an_unreachable_store_costs_no_attempt(
    server_harness: ServerHarness, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job succeeds once the store is reachable again and its pause is over."""
    server_harness.settings = server_harness.settings.model_copy(
        update={"storage_url": object_store.new_bucket(), "notify_seconds": 1.0}
    )
    server_harness.store = BlobStore.from_settings(server_harness.settings)
    server_harness.add_target()
    server_harness.add_corpus()
    job_id = server_harness.add_distil(steps=3)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{LOOPBACK}:{free_port()}")  # nothing listens there
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        supervisor(server_harness).run(job_id)
    row = server_harness.job(job_id)
    assert (row.state, row.attempt, row.error) == (JobState.QUEUED, 0, None)
    assert server_harness.events(job_id)[-1].data["reason"] == PASSING[STORAGE_AWAY]
    wait_for(lambda: supervisor(server_harness).run(job_id) or server_harness.job(job_id).state.ended, 60.0)
    row = server_harness.job(job_id)
    assert (row.state, row.attempt, row.error) == (JobState.SUCCEEDED, 1, None)


@pytest.mark.slow
def test_a_notification_that_is_redelivered_to_another_worker_does_no_harm(ready: ServerHarness) -> None:
    """A busy worker holds a notification for longer than the visibility timeout; another one runs the job, once."""
    ready.settings = ready.settings.model_copy(update={"visibility_seconds": 1.0, "notify_seconds": 1000.0})
    endless, short = ready.add_distil(steps=ENDLESS), ready.add_distil(steps=3, name="short")
    notifier.notify(endless, ready.settings)
    busy = ready.start_worker()
    ready.reaches(endless, stage="distil")
    with Redis.from_url(ready.settings.redis_url) as client:
        notifier.notify(short, ready.settings)
        wait_for(lambda: client.hlen("unacked") == 1)
        wait_for(lambda: notifier.waiting(ready.settings) == 1)  # redelivered while the first worker is busy
    other = ready.start_worker()
    row = ready.ended(short)
    assert (row.state, row.attempt) == (JobState.SUCCEEDED, 1)
    with ready.database.write() as session:
        states.request_cancel(session, endless)
    assert ready.ended(endless).state is JobState.CANCELLED
    wait_for(lambda: notifier.waiting(ready.settings) == 0)
    for worker in (busy, other):
        worker.terminate()
        assert worker.wait(20) == 0
    assert states_of(ready, short) == ["queued", "running", "succeeded"]
    assert states_of(ready, endless) == ["queued", "running", "cancelling", "cancelled"]


@pytest.mark.slow
def test_a_hanging_job_is_detected_and_retried(ready: ServerHarness) -> None:
    """Its process is alive and its worker renews the lease, but it makes no progress."""
    ready.settings = ready.settings.model_copy(
        # a long lease, so that a busy machine doesn't look like a lost worker
        update={"progress_seconds": 30.0, "max_attempts": 2, "lease_seconds": 60.0}
    )
    job_id = ready.add_distil(steps=ENDLESS)
    notifier.notify(job_id, ready.settings)
    worker = ready.start_worker()
    hung = []
    for attempt in (1, 2):
        wait_for(lambda attempt=attempt: ready.job(job_id).attempt == attempt, 100.0)  # type: ignore[misc]
        wait_for(lambda: ready.events(job_id)[-1].kind in ("progress", "metrics"), 60.0)
        (process,) = job_processes(worker)
        process.send_signal(signal.SIGSTOP)
        hung.append(process)
    row = ready.ended(job_id, 100.0)
    assert row.state is JobState.FAILED
    assert row.error is not None
    assert row.error["code"] == "job_stalled"
    assert "POST_PROGRESS_SECONDS" in row.error["detail"]
    assert states_of(ready, job_id) == ["queued", "running", "queued", "running", "failed"]
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in hung)


def test_a_hanging_redis_does_not_block_notify(server_harness: ServerHarness) -> None:
    process = server_harness.start_redis()
    process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor() as executor:
        notified = executor.submit(notifier.notify, "job_1", server_harness.settings)
        try:
            assert notified.result(30) is False
        finally:
            process.send_signal(signal.SIGCONT)
