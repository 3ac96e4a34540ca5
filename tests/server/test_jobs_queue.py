"""Whose turn it is: priority, fairness, age; a key's limit and a job's device hold whoever looks and however often."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from post_server.jobs import doorbell, states
from post_server.jobs.broker import queue_of
from post_server.jobs.queue import GPU, claim_next, devices
from post_server.jobs.reconciler import reconcile
from post_server.keys import create_key, limit_key
from post_server.records import ApiKeyRow, JobRow, now
from post_server.settings import Settings
from post_shared.schemas import JobKind, JobState, Role
from tests.server.backstage import Backstage
from tests.server.front import Front, prompt_bytes


def add(backstage: Backstage, owner: ApiKeyRow, *, priority: int = 0, device: str | None = None) -> str:
    job_id = backstage.add_job(JobKind.TRANSFER, {}, owner)
    with backstage.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(priority=priority, device=device))
    return job_id


def take(backstage: Backstage, **more: object) -> str | None:
    with backstage.database.write() as session:
        found = claim_next(session, backstage.settings.model_copy(update=more))
    return found[0].id if found else None


def limit(backstage: Backstage, owner: ApiKeyRow, running: int | None) -> None:
    with backstage.database.write() as session:
        limit_key(session, owner.id, running_jobs=running)


def end(backstage: Backstage, job_id: str) -> None:
    with backstage.database.write() as session:
        states.finish(session, states.Lease(job_id, str(backstage.job(job_id).token)), {})


@pytest.fixture
def others(backstage: Backstage) -> list[ApiKeyRow]:
    with backstage.database.write() as session:
        return [create_key(session, name=name, role=Role.OWNER)[0] for name in ("alice", "bob")]


def test_priority_then_fewest_running_then_age(backstage: Backstage, others: list[ApiKeyRow]) -> None:
    alice, bob = others
    first, second = add(backstage, alice), add(backstage, alice)
    late = add(backstage, bob)
    urgent = add(backstage, alice, priority=5)
    whenever = add(backstage, bob, priority=-5)
    assert [take(backstage) for _ in range(6)] == [urgent, late, first, second, whenever, None]


def test_a_job_that_was_given_back_keeps_its_place(backstage: Backstage, others: list[ApiKeyRow]) -> None:
    first, second = add(backstage, others[0]), add(backstage, others[0])
    assert take(backstage) == first
    with backstage.database.write() as session:
        states.release(session, states.Lease(first, str(backstage.job(first).token)), reason="worker_stopped")
    assert [take(backstage), take(backstage)] == [first, second]


def test_a_job_that_rests_is_passed_over(backstage: Backstage, others: list[ApiKeyRow]) -> None:
    """As after an outage: a worker that takes it again at once would fail again at once."""
    first, second = add(backstage, others[0]), add(backstage, others[0])
    assert take(backstage) == first
    with backstage.database.write() as session:
        lease = states.Lease(first, str(backstage.job(first).token))
        states.release(session, lease, reason="disk_full", give_attempt_back=True, pause_seconds=60.0)
    assert [take(backstage), take(backstage)] == [second, None]
    with backstage.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == first).values(queued_at=now()))
    assert take(backstage) == first


def test_a_key_runs_as_many_jobs_as_it_may(backstage: Backstage, others: list[ApiKeyRow]) -> None:
    alice, bob = others
    mine = [add(backstage, alice) for _ in range(3)]
    assert take(backstage, running_jobs_per_key=1) == mine[0]
    assert take(backstage, running_jobs_per_key=1) is None
    theirs = add(backstage, bob)
    assert take(backstage, running_jobs_per_key=1) == theirs, "another key is not held up"
    end(backstage, mine[0])
    assert take(backstage, running_jobs_per_key=1) == mine[1]
    limit(backstage, alice, 2)
    assert take(backstage, running_jobs_per_key=1) == mine[2], "its own limit stands before the server's"


def test_a_cancelling_job_still_takes_its_place_and_a_lost_one_does_not(
    backstage: Backstage, others: list[ApiKeyRow]
) -> None:
    first, second = add(backstage, others[0]), add(backstage, others[0])
    assert take(backstage, running_jobs_per_key=1) == first
    with backstage.database.write() as session:
        states.request_cancel(session, first)
    assert take(backstage, running_jobs_per_key=1) is None
    with backstage.database.write() as session:
        session.execute(update(JobRow).values(lease_until=now() - timedelta(seconds=1)))
    assert take(backstage, running_jobs_per_key=1) == second


def test_many_workers_at_once_keep_to_the_limit(backstage: Backstage, others: list[ApiKeyRow]) -> None:
    for _ in range(8):
        add(backstage, others[0])
    limit(backstage, others[0], 3)
    barrier, taken = threading.Barrier(8), []

    def run() -> None:
        barrier.wait()
        taken.append(take(backstage))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = [each for each in taken if each]
    assert len(got) == len(set(got)) == 3
    assert len(taken) == 8


# --- devices ------------------------------------------------------------------------------------------


def test_a_job_for_a_gpu_waits_for_one(backstage: Backstage, others: list[ApiKeyRow]) -> None:
    heavy, light = add(backstage, others[0], device=GPU), add(backstage, others[1])
    assert take(backstage, device="cpu") == light
    assert take(backstage, device="cpu") is None
    assert take(backstage, device="cuda:1") == heavy


def test_what_a_worker_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(device: str) -> frozenset[str]:
        return devices(Settings(home=tmp_path, device=device))

    monkeypatch.setattr("post_server.jobs.queue._gpus", lambda: [Path("/dev/nvidia0")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [seen("cpu"), seen("cuda:1"), seen("auto")] == [frozenset(), {GPU}, {GPU}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert seen("auto") == frozenset()


@pytest.mark.parametrize("words", ["dance", "distil,", "distil transfer"])
def test_only_kinds_of_jobs_can_be_kept_for_gpus(tmp_path: Path, words: str) -> None:
    with pytest.raises(ValueError):
        Settings(home=tmp_path, gpu_jobs=words)
    assert Settings(home=tmp_path, gpu_jobs="distil,transfer").gpu_jobs


def test_a_job_always_rests_a_moment_while_its_store_is_away(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        Settings(home=tmp_path, ring_seconds=0)


def test_rings_reach_those_that_can_do_the_job(backstage: Backstage, others: list[ApiKeyRow]) -> None:
    """By device class; and what a key's limit holds back is not announced."""
    backstage.start_redis()
    settings = backstage.settings.model_copy(update={"ring_seconds": 0.0, "running_jobs_per_key": 1})
    heavy, light = add(backstage, others[0], device=GPU), add(backstage, others[1])
    assert sorted(reconcile(backstage.database, settings)) == sorted([heavy, light])
    assert [doorbell.waiting(settings), doorbell.waiting(settings, GPU)] == [1, 1]
    assert queue_of(None) != queue_of(GPU)
    assert reconcile(backstage.database, settings) == [], "they wait in the broker already"
    held = add(backstage, others[1])
    assert take(backstage) == light
    with backstage.database.read() as session:
        assert session.get_one(JobRow, held).state is JobState.QUEUED
    with doorbell.celery_for(settings).connection_for_write() as connection:
        connection.default_channel.client.delete(queue_of(GPU), queue_of(None))
    assert reconcile(backstage.database, settings) == [heavy]


# --- over HTTP ----------------------------------------------------------------------------------------


def test_an_order_takes_its_keys_priority_and_its_kinds_device(home: Path) -> None:
    front = Front(home, gpu_jobs="transfer")
    try:
        target, student = front.add_pair()
        front.add_dataset()
        with front.database.write() as session:
            limit_key(session, "alice", job_priority=7)
        prompt = front.push("alice", prompt_bytes(student.hash)).json()["id"]
        order = {"prompt": prompt, "target": target.id, "dataset": "public"}
        job = front("alice", "POST", "/v1/transfers", json=order).json()
        assert job["priority"] == 7
        assert (front.job(job["id"]).priority, front.job(job["id"]).device) == (7, GPU)
        order = {"model": target.id, "dataset": "public", "task": {"template": "{text}"}}
        task = {"template": "{text}", "label_words": {"positive": ["good"], "negative": ["bad"]}}
        job = front("bob", "POST", "/v1/evaluations", json=order | {"task": task}).json()
        assert (front.job(job["id"]).priority, front.job(job["id"]).device) == (0, None)
    finally:
        front.close()
