"""The worker and its processes, killed, stopped, paused and cancelled in the middle of a real distillation."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from post_server.db.tables import JobRow
from post_server.jobs import notifier, states
from post_server.worker.supervisor import work_folder
from post_shared.schemas.jobs import JobState
from tests.server.server_harness import ServerHarness, job_processes, undisturbed_hash, wait_for

STEPS = 400
ENDLESS = 10_000_000


def succeeded(server_harness: ServerHarness, job_id: str) -> JobRow:
    row = server_harness.ended(job_id)
    assert row.state is JobState.SUCCEEDED, (row.error, server_harness.log())
    assert row.progress == 1.0
    assert not work_folder(server_harness.settings, job_id).exists() or wait_for(
        lambda: not work_folder(server_harness.settings, job_id).exists(), 5.0
    )
    return row


def first_steps(server_harness: ServerHarness, job_id: str) -> list[int]:
    """The first distillation step that each attempt reported."""
    steps: list[int] = []
    started = False
    for event in server_harness.events(job_id):
        started = started or event.data.get("state") == "running"
        if started and event.kind == "progress" and event.data["stage"] == "distil":
            steps.append(event.data["step"])
            started = False
    return steps


def test_the_job_of_a_killed_worker_is_continued_by_another(ready: ServerHarness, tmp_path: Path) -> None:
    job_id = ready.add_distil(steps=STEPS)
    assert notifier.notify(job_id, ready.settings)
    worker = ready.start_worker()
    ready.reaches(job_id, stage="distil", progress=0.2)
    (process,) = job_processes(worker)
    worker.kill()
    worker.wait()
    wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, 10.0)
    assert not ready.job(job_id).state.ended
    ready.start_worker()
    row = succeeded(ready, job_id)
    assert row.attempt == 2
    assert first_steps(ready, job_id)[1] > 1, "it started from its checkpoint"
    assert row.result is not None
    assert row.result["hash"] == undisturbed_hash(ready, job_id, tmp_path)


def test_a_killed_job_process_and_a_stopped_worker(ready: ServerHarness, tmp_path: Path) -> None:
    """Running out of memory looks like this; the worker survives. A stop then costs no attempt."""
    ready.settings = ready.settings.model_copy(update={"job_nice": 1})
    job_id = ready.add_distil(steps=STEPS)
    notifier.notify(job_id, ready.settings)
    worker = ready.start_worker()
    ready.reaches(job_id, stage="distil", progress=0.1)
    (process,) = job_processes(worker)
    assert process.nice() == min(19, psutil.Process(worker.pid).nice() + ready.settings.job_nice)
    process.kill()
    wait_for(lambda: len(first_steps(ready, job_id)) == 2)  # the row still shows the progress of the first attempt
    worker.terminate()
    assert worker.wait(15) == 0
    row = ready.job(job_id)
    assert (row.state, row.attempt, row.token) == (JobState.QUEUED, 1, None)
    assert (work_folder(ready.settings, job_id) / "checkpoint").is_dir()
    ready.start_worker()
    row = succeeded(ready, job_id)
    starts = first_steps(ready, job_id)
    assert row.attempt == 2
    assert starts == sorted(starts)
    assert len(set(starts)) == 3
    assert row.result is not None
    assert row.result["hash"] == undisturbed_hash(ready, job_id, tmp_path)


def test_a_stop_releases_the_job_even_if_its_process_hangs(ready: ServerHarness) -> None:
    """The process can't reach the end of its step: it is killed, and its last checkpoint stays."""
    ready.settings = ready.settings.model_copy(update={"stop_seconds": 3.0, "lease_seconds": 600.0})
    job_id = ready.add_distil(steps=ENDLESS)
    notifier.notify(job_id, ready.settings)
    worker = ready.start_worker()
    ready.reaches(job_id, stage="distil", progress=0.0)
    wait_for(lambda: (work_folder(ready.settings, job_id) / "checkpoint").is_dir())
    (process,) = job_processes(worker)
    process.send_signal(signal.SIGSTOP)
    worker.terminate()
    assert worker.wait(30) == 0
    row = ready.job(job_id)
    assert (row.state, row.attempt, row.token, row.lease_until) == (JobState.QUEUED, 0, None, None)
    assert ready.events(job_id)[-1].data["reason"] == "worker_stopped"
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    assert (work_folder(ready.settings, job_id) / "checkpoint").is_dir()


def test_a_paused_worker_that_resumes_does_no_harm(ready: ServerHarness) -> None:
    ready.settings = ready.settings.model_copy(update={"lease_seconds": 2.0})
    job_id = ready.add_distil(steps=ENDLESS)
    notifier.notify(job_id, ready.settings)
    paused = ready.start_worker()
    ready.reaches(job_id, stage="distil")
    old = job_processes(paused)
    with ready.database.write() as session:  # not amid a write, which would lock the database
        session.get_one(JobRow, job_id, with_for_update=True)
        paused.send_signal(signal.SIGSTOP)
    other = ready.start_worker()
    wait_for(lambda: ready.job(job_id).attempt == 2)
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in old), 10.0)
    wait_for(lambda: len(first_steps(ready, job_id)) == 2)
    token = ready.job(job_id).token
    paused.send_signal(signal.SIGCONT)
    paused.terminate()
    assert paused.wait(15) == 0
    row = ready.job(job_id)
    assert (row.state, row.attempt, row.token) == (JobState.RUNNING, 2, token), "the paused worker left the job alone"
    other.terminate()
    assert other.wait(15) == 0
    assert ready.job(job_id).state is JobState.QUEUED


def test_cancel_and_duplicate_deliveries(ready: ServerHarness) -> None:
    """One worker: an endless job cancelled during a step, then a short one that was announced five times."""
    endless, short = ready.add_distil(steps=ENDLESS), ready.add_distil(steps=3)
    for job_id in (endless, short, short, short, short, short):
        assert notifier.notify(job_id, ready.settings)
    ready.start_worker()
    ready.reaches(endless, stage="distil")
    with ready.database.write() as session:
        assert states.request_cancel(session, endless).state is JobState.CANCELLING
    row = ready.ended(endless, ready.settings.cancel_grace_seconds)
    assert (row.state, row.error, row.result) == (JobState.CANCELLED, None, None)
    row = succeeded(ready, short)
    wait_for(lambda: notifier.waiting(ready.settings) == 0)
    assert not work_folder(ready.settings, endless).exists()
    job_states = [event.data.get("state") for event in ready.events(short) if event.kind == "state"]
    assert job_states == ["queued", "running", "succeeded"]
    assert row.attempt == 1


def test_the_reconciler_announces_jobs_that_notify_could_not(server_harness: ServerHarness) -> None:
    """A job whose process dies every time fails with its own error code."""
    settings = server_harness.settings.model_copy(update={"max_attempts": 2})
    server_harness.settings = settings
    server_harness.add_target()
    server_harness.add_corpus()
    job_id = server_harness.add_distil(steps=ENDLESS)
    assert not notifier.notify(job_id, settings), "there is no Redis yet"
    server_harness.start_redis()
    worker = server_harness.start_worker()
    for attempt in (1, 2):
        wait_for(lambda attempt=attempt: server_harness.job(job_id).attempt == attempt)  # type: ignore[misc]
        (process,) = wait_for(lambda: job_processes(worker))
        process.kill()
    row = server_harness.ended(job_id)
    assert row.state is JobState.FAILED
    assert row.error is not None
    assert row.error["code"] == "job_killed"
    assert "memory" in row.error["detail"]
