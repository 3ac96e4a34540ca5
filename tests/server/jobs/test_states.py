"""The rules of a job row: one holder at a time, and only the holder writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from post_server.db.tables import DatasetRow, JobRow, now
from post_server.jobs import states
from post_server.jobs.reconciler import reconcile
from post_server.jobs.states import Lease, LeaseLost
from post_shared.errors import DataInvalid, NotFound
from post_shared.schemas.datasets import DatasetKind
from post_shared.schemas.jobs import JobKind, JobState
from tests.server.server_harness import ServerHarness

LEASE = 30.0
WRITES: dict[str, Callable[[Any, Lease], Any]] = {
    "heartbeat": lambda session, lease: states.heartbeat(session, lease, lease_seconds=LEASE),
    "held_state": states.held_state,
    "record_progress": lambda session, lease: states.record_progress(
        session, lease, progress=0.5, stage="distil", step=1, steps=2, metrics={"loss": 1.0}
    ),
    "finish": lambda session, lease: states.finish(session, lease, {}),
    "fail": lambda session, lease: states.fail(session, lease, DataInvalid("x")),
    "cancel": states.cancel,
    "release": lambda session, lease: states.release(session, lease, reason="x"),
}


@pytest.fixture
def job_id(server_harness: ServerHarness) -> str:
    return server_harness.add_job(JobKind.DISTIL, {"name": "x"})


def claim(server_harness: ServerHarness, job_id: str, *, attempts: int = 3) -> Lease | None:
    with server_harness.database.write() as session:
        claimed = states.claim(session, job_id, lease_seconds=LEASE, max_attempts=attempts)
    return claimed[1] if claimed else None


def claim_lease(server_harness: ServerHarness, job_id: str) -> Lease:
    lease = claim(server_harness, job_id)
    assert lease is not None
    return lease


def expire(server_harness: ServerHarness, job_id: str) -> None:
    """As if the worker had been silent for longer than its lease."""
    with server_harness.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(lease_until=now() - timedelta(seconds=1)))


def test_of_many_concurrent_claims_one_wins(server_harness: ServerHarness, job_id: str) -> None:
    barrier, leases = threading.Barrier(8), []

    def run() -> None:
        barrier.wait()
        leases.append(claim(server_harness, job_id))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(leases) == 8
    assert sum(lease is not None for lease in leases) == 1
    assert server_harness.job(job_id).attempt == 1


@pytest.mark.parametrize("write", WRITES)
def test_a_stale_token_changes_nothing(server_harness: ServerHarness, job_id: str, write: str) -> None:
    stale = claim_lease(server_harness, job_id)
    expire(server_harness, job_id)
    claim_lease(server_harness, job_id)  # by another worker
    before = server_harness.job(job_id).__dict__ | {"_sa_instance_state": None}
    events = len(server_harness.events(job_id))
    with pytest.raises(LeaseLost), server_harness.database.write() as session:
        WRITES[write](session, stale)
    assert server_harness.job(job_id).__dict__ | {"_sa_instance_state": None} == before
    assert len(server_harness.events(job_id)) == events


@pytest.mark.parametrize("write", WRITES)
def test_an_ended_job_accepts_no_write(server_harness: ServerHarness, job_id: str, write: str) -> None:
    lease = claim_lease(server_harness, job_id)
    with server_harness.database.write() as session:
        states.finish(session, lease, {"model_id": "mod_1"})
    with pytest.raises(LeaseLost), server_harness.database.write() as session:
        WRITES[write](session, lease)
    assert server_harness.job(job_id).state is JobState.SUCCEEDED
    assert server_harness.job(job_id).result == {"model_id": "mod_1"}


@pytest.mark.parametrize("state", [state for state in JobState if state is not JobState.QUEUED])
def test_only_a_queued_job_is_claimed(server_harness: ServerHarness, job_id: str, state: JobState) -> None:
    with server_harness.database.write() as session:
        later = now() + timedelta(minutes=1)
        session.execute(update(JobRow).where(JobRow.id == job_id).values(state=state, lease_until=later))
    assert claim(server_harness, job_id) is None


def test_an_expired_lease_is_claimed_with_a_fresh_token(server_harness: ServerHarness, job_id: str) -> None:
    first = claim_lease(server_harness, job_id)
    assert claim(server_harness, job_id) is None
    expire(server_harness, job_id)
    second = claim_lease(server_harness, job_id)
    assert second.token != first.token
    assert server_harness.job(job_id).attempt == 2
    expire(server_harness, job_id)
    assert claim(server_harness, job_id, attempts=2) is None


def test_rows_of_a_stale_worker_are_rolled_back_with_its_result(server_harness: ServerHarness, job_id: str) -> None:
    stale = claim_lease(server_harness, job_id)
    expire(server_harness, job_id)
    claim_lease(server_harness, job_id)
    row = DatasetRow(name="made", kind=DatasetKind.ROWS, rows=1, sha256="0" * 64, size_bytes=1)

    def save() -> None:
        with server_harness.database.write() as session:
            session.add(row)
            session.flush()
            states.finish(session, stale, {"dataset_id": row.id})

    with pytest.raises(LeaseLost):
        save()
    with server_harness.database.read() as session:
        assert session.get(DatasetRow, row.id) is None


def test_events_are_numbered_without_gaps_by_many_writers(server_harness: ServerHarness, job_id: str) -> None:
    lease = claim_lease(server_harness, job_id)

    def write() -> None:
        for step in range(10):
            with server_harness.database.write() as session:
                states.record_progress(session, lease, progress=0.1, stage="distil", step=step, steps=10, metrics={})

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.sequence for event in server_harness.events(job_id)] == list(range(1, 43))


def test_progress_and_metrics(server_harness: ServerHarness, job_id: str) -> None:
    lease = claim_lease(server_harness, job_id)
    for step, metrics in enumerate([{"loss": 2.0, "ce": 1.0}, {"loss": 1.5}], 1):
        with server_harness.database.write() as session:
            states.record_progress(
                session, lease, progress=step / 4, stage="distil", step=step, steps=4, metrics=metrics
            )
    row = server_harness.job(job_id)
    assert (row.progress, row.stage, row.metrics) == (0.5, "distil", {"loss": 1.5, "ce": 1.0})
    kinds = [event.kind for event in server_harness.events(job_id)]
    assert kinds == ["state", "state", "progress", "metrics", "progress", "metrics"]


# --- cancel -------------------------------------------------------------------------------------------


def cancel(server_harness: ServerHarness, job_id: str) -> JobState:
    with server_harness.database.write() as session:
        return states.request_cancel(session, job_id).state


def test_a_queued_job_is_cancelled_at_once(server_harness: ServerHarness, job_id: str) -> None:
    assert cancel(server_harness, job_id) is JobState.CANCELLED
    assert claim(server_harness, job_id) is None
    assert cancel(server_harness, job_id) is JobState.CANCELLED
    assert [event.data["state"] for event in server_harness.events(job_id)] == ["queued", "cancelled"]


def test_the_heartbeat_of_a_running_job_shows_the_cancel(server_harness: ServerHarness, job_id: str) -> None:
    lease = claim_lease(server_harness, job_id)
    assert cancel(server_harness, job_id) is JobState.CANCELLING
    with server_harness.database.write() as session:
        assert states.heartbeat(session, lease, lease_seconds=LEASE) is JobState.CANCELLING
        states.release(session, lease, reason="stop")  # a cancelling job is not queued again
    row = server_harness.job(job_id)
    assert row.state is JobState.CANCELLED
    assert row.cancel_requested_at is not None
    assert row.finished_at is not None


def test_a_cancelling_job_that_finishes_has_succeeded(server_harness: ServerHarness, job_id: str) -> None:
    lease = claim_lease(server_harness, job_id)
    cancel(server_harness, job_id)
    with server_harness.database.write() as session:
        states.finish(session, lease, {})
    assert cancel(server_harness, job_id) is JobState.SUCCEEDED


def test_cancelling_an_unknown_job_is_not_found(server_harness: ServerHarness) -> None:
    with pytest.raises(NotFound):
        cancel(server_harness, "job_unknown")


# --- release and reconcile ----------------------------------------------------------------------------


@pytest.mark.parametrize(("back", "attempt"), [(True, 0), (False, 1)])
def test_release(server_harness: ServerHarness, job_id: str, back: bool, attempt: int) -> None:
    lease = claim_lease(server_harness, job_id)
    with server_harness.database.write() as session:
        states.release(session, lease, reason="worker_stopped", give_attempt_back=back)
    row = server_harness.job(job_id)
    assert (row.state, row.attempt, row.token, row.lease_until) == (JobState.QUEUED, attempt, None, None)


def test_a_lost_job_is_queued_until_its_attempts_are_used_up(server_harness: ServerHarness, job_id: str) -> None:
    for attempt in range(1, server_harness.settings.max_attempts + 1):
        assert server_harness.job(job_id).state is JobState.QUEUED
        claim_lease(server_harness, job_id)
        reconcile(server_harness.database, server_harness.settings)
        assert server_harness.job(job_id).state is JobState.RUNNING, "the lease still holds"
        expire(server_harness, job_id)
        reconcile(server_harness.database, server_harness.settings)
        assert server_harness.job(job_id).attempt == attempt
    row = server_harness.job(job_id)
    assert row.state is JobState.FAILED
    assert row.error is not None
    assert row.error["code"] == "worker_lost"


def test_a_lost_cancelling_job_is_cancelled(server_harness: ServerHarness, job_id: str) -> None:
    claim_lease(server_harness, job_id)
    cancel(server_harness, job_id)
    expire(server_harness, job_id)
    reconcile(server_harness.database, server_harness.settings)
    assert server_harness.job(job_id).state is JobState.CANCELLED


def test_many_reconcilers_take_a_job_back_once(server_harness: ServerHarness, job_id: str) -> None:
    claim_lease(server_harness, job_id)
    expire(server_harness, job_id)
    threads = [
        threading.Thread(target=reconcile, args=(server_harness.database, server_harness.settings)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    states_seen = [event.data["state"] for event in server_harness.events(job_id)]
    assert states_seen == ["queued", "running", "queued"]


def test_reconcile_announces_jobs_that_no_worker_heard_of(server_harness: ServerHarness, job_id: str) -> None:
    assert reconcile(server_harness.database, server_harness.settings) == [], "without Redis: no notification, no error"
    server_harness.start_redis()
    time.sleep(server_harness.settings.notify_seconds)
    assert reconcile(server_harness.database, server_harness.settings) == [job_id]
    assert reconcile(server_harness.database, server_harness.settings) == [], "it already waits in the broker"
