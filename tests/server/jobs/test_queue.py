"""Which job is next: priority, fairness, age. A key's limit and a job's device hold for all concurrent workers."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from post_server.auth.keys import create_key, limit_key
from post_server.db.tables import ApiKeyRow, JobRow, now
from post_server.jobs import notifier, states
from post_server.jobs.broker import queue_of
from post_server.jobs.queue import GPU, claim_next, devices
from post_server.jobs.reconciler import reconcile
from post_server.settings import Settings
from post_shared.schemas.common import Role
from post_shared.schemas.jobs import JobKind, JobState
from tests.server.http_harness import HttpHarness, prompt_bytes
from tests.server.server_harness import ServerHarness


def add(server_harness: ServerHarness, owner: ApiKeyRow, *, priority: int = 0, device: str | None = None) -> str:
    job_id = server_harness.add_job(JobKind.TRANSFER, {}, owner)
    with server_harness.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(priority=priority, device=device))
    return job_id


def take(server_harness: ServerHarness, **more: object) -> str | None:
    with server_harness.database.write() as session:
        claimed = claim_next(session, server_harness.settings.model_copy(update=more))
    return claimed[0].id if claimed else None


def limit(server_harness: ServerHarness, owner: ApiKeyRow, running: int | None) -> None:
    with server_harness.database.write() as session:
        limit_key(session, owner.id, running_jobs=running)


def end(server_harness: ServerHarness, job_id: str) -> None:
    with server_harness.database.write() as session:
        states.finish(session, states.Lease(job_id, str(server_harness.job(job_id).token)), {})


@pytest.fixture
def others(server_harness: ServerHarness) -> list[ApiKeyRow]:
    with server_harness.database.write() as session:
        return [create_key(session, name=name, role=Role.OWNER)[0] for name in ("alice", "bob")]


def test_priority_then_fewest_running_then_age(server_harness: ServerHarness, others: list[ApiKeyRow]) -> None:
    alice, bob = others
    first, second = add(server_harness, alice), add(server_harness, alice)
    late = add(server_harness, bob)
    urgent = add(server_harness, alice, priority=5)
    whenever = add(server_harness, bob, priority=-5)
    assert [take(server_harness) for _ in range(6)] == [urgent, late, first, second, whenever, None]


def test_a_released_job_keeps_its_place(server_harness: ServerHarness, others: list[ApiKeyRow]) -> None:
    first, second = add(server_harness, others[0]), add(server_harness, others[0])
    assert take(server_harness) == first
    with server_harness.database.write() as session:
        states.release(session, states.Lease(first, str(server_harness.job(first).token)), reason="worker_stopped")
    assert [take(server_harness), take(server_harness)] == [first, second]


def test_a_pausing_job_is_skipped(server_harness: ServerHarness, others: list[ApiKeyRow]) -> None:
    """As after an outage: a worker that claims it again immediately would fail again."""
    first, second = add(server_harness, others[0]), add(server_harness, others[0])
    assert take(server_harness) == first
    with server_harness.database.write() as session:
        lease = states.Lease(first, str(server_harness.job(first).token))
        states.release(session, lease, reason="disk_full", give_attempt_back=True, pause_seconds=60.0)
    assert [take(server_harness), take(server_harness)] == [second, None]
    with server_harness.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == first).values(queued_at=now()))
    assert take(server_harness) == first


def test_a_key_runs_no_more_jobs_than_its_limit(server_harness: ServerHarness, others: list[ApiKeyRow]) -> None:
    alice, bob = others
    mine = [add(server_harness, alice) for _ in range(3)]
    assert take(server_harness, running_jobs_per_key=1) == mine[0]
    assert take(server_harness, running_jobs_per_key=1) is None
    theirs = add(server_harness, bob)
    assert take(server_harness, running_jobs_per_key=1) == theirs, "another key doesn't wait"
    end(server_harness, mine[0])
    assert take(server_harness, running_jobs_per_key=1) == mine[1]
    limit(server_harness, alice, 2)
    assert take(server_harness, running_jobs_per_key=1) == mine[2], "its own limit overrides the server's"


def test_a_cancelling_job_counts_as_running_and_a_lost_one_does_not(
    server_harness: ServerHarness, others: list[ApiKeyRow]
) -> None:
    first, second = add(server_harness, others[0]), add(server_harness, others[0])
    assert take(server_harness, running_jobs_per_key=1) == first
    with server_harness.database.write() as session:
        states.request_cancel(session, first)
    assert take(server_harness, running_jobs_per_key=1) is None
    with server_harness.database.write() as session:
        session.execute(update(JobRow).values(lease_until=now() - timedelta(seconds=1)))
    assert take(server_harness, running_jobs_per_key=1) == second


def test_many_concurrent_workers_keep_to_the_limit(server_harness: ServerHarness, others: list[ApiKeyRow]) -> None:
    for _ in range(8):
        add(server_harness, others[0])
    limit(server_harness, others[0], 3)
    barrier, claims = threading.Barrier(8), []

    def run() -> None:
        barrier.wait()
        claims.append(take(server_harness))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    claimed = [job_id for job_id in claims if job_id]
    assert len(claimed) == len(set(claimed)) == 3
    assert len(claims) == 8


# --- devices ------------------------------------------------------------------------------------------


def test_a_job_for_a_gpu_waits_for_one(server_harness: ServerHarness, others: list[ApiKeyRow]) -> None:
    heavy, light = add(server_harness, others[0], device=GPU), add(server_harness, others[1])
    assert take(server_harness, device="cpu") == light
    assert take(server_harness, device="cpu") is None
    assert take(server_harness, device="cuda:1") == heavy


def test_what_a_worker_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(device: str) -> frozenset[str]:
        return devices(Settings(home=tmp_path, device=device))

    monkeypatch.setattr("post_server.jobs.queue._gpus", lambda: [Path("/dev/nvidia0")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [visible("cpu"), visible("cuda:1"), visible("auto")] == [frozenset(), {GPU}, {GPU}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible("auto") == frozenset()


@pytest.mark.parametrize("words", ["dance", "distil,", "distil transfer"])
def test_gpu_jobs_must_be_kinds_of_jobs(tmp_path: Path, words: str) -> None:
    with pytest.raises(ValueError):
        Settings(home=tmp_path, gpu_jobs=words)
    assert Settings(home=tmp_path, gpu_jobs="distil,transfer").gpu_jobs


def test_a_job_always_pauses_while_its_store_is_away(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        Settings(home=tmp_path, notify_seconds=0)


def test_notifications_reach_the_workers_that_can_run_the_job(
    server_harness: ServerHarness, others: list[ApiKeyRow]
) -> None:
    """By device class; jobs over their key's limit are not announced."""
    server_harness.start_redis()
    settings = server_harness.settings.model_copy(update={"notify_seconds": 0.0, "running_jobs_per_key": 1})
    heavy, light = add(server_harness, others[0], device=GPU), add(server_harness, others[1])
    assert sorted(reconcile(server_harness.database, settings)) == sorted([heavy, light])
    assert [notifier.waiting(settings), notifier.waiting(settings, GPU)] == [1, 1]
    assert queue_of(None) != queue_of(GPU)
    assert reconcile(server_harness.database, settings) == [], "they already wait in the broker"
    held = add(server_harness, others[1])
    assert take(server_harness) == light
    with server_harness.database.read() as session:
        assert session.get_one(JobRow, held).state is JobState.QUEUED
    with notifier.celery_for(settings).connection_for_write() as connection:
        connection.default_channel.client.delete(queue_of(GPU), queue_of(None))
    assert reconcile(server_harness.database, settings) == [heavy]


# --- over HTTP ----------------------------------------------------------------------------------------


def test_a_job_gets_the_priority_of_its_key_and_the_device_of_its_kind(home: Path) -> None:
    http_harness = HttpHarness(home, gpu_jobs="transfer")
    try:
        target, student = http_harness.add_pair()
        http_harness.add_dataset()
        with http_harness.database.write() as session:
            limit_key(session, "alice", job_priority=7)
        prompt = http_harness.push("alice", prompt_bytes(student.hash)).json()["id"]
        body = {"prompt": prompt, "target": target.id, "dataset": "public"}
        job = http_harness("alice", "POST", "/v1/transfers", json=body).json()
        assert job["priority"] == 7
        assert (http_harness.job(job["id"]).priority, http_harness.job(job["id"]).device) == (7, GPU)
        body = {"model": target.id, "dataset": "public", "task": {"template": "{text}"}}
        task = {"template": "{text}", "label_words": {"positive": ["good"], "negative": ["bad"]}}
        job = http_harness("bob", "POST", "/v1/evaluations", json=body | {"task": task}).json()
        assert (http_harness.job(job["id"]).priority, http_harness.job(job["id"]).device) == (0, None)
    finally:
        http_harness.close()
