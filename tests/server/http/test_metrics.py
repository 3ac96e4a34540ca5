"""What Prometheus reads: the queue, the pace of the work and lost workers, as the rows have them."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from sqlalchemy import update

from post_server.db.tables import JobRow, now
from post_server.jobs import states
from post_server.worker.progress import ProgressWriter
from post_shared.schemas.jobs import JobKind
from post_shared.training.progress import Progress
from tests.server.http_harness import HttpHarness


@pytest.fixture
def job_id(http_harness: HttpHarness) -> str:
    row = JobRow(kind=JobKind.DISTIL, request={}, owner_key_id=http_harness.key_ids["provider"])
    with http_harness.database.write() as session:
        states.announce(session, row)
    return row.id


def value(http_harness: HttpHarness, series: str) -> float | None:
    """The series as /metrics has it; None when it isn't there."""
    found = re.search(rf"^{re.escape(series)} (\S+)$", http_harness(None, "GET", "/metrics").text, re.MULTILINE)
    return float(found[1]) if found else None


def claim(http_harness: HttpHarness, job_id: str) -> states.Lease:
    with http_harness.database.write() as session:
        found = states.claim(session, job_id, lease_seconds=30.0, max_attempts=9)
    assert found is not None
    return found[1]


def set_job(http_harness: HttpHarness, job_id: str, **values: object) -> None:
    with http_harness.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(**values))


def test_the_age_of_the_queue_is_that_of_its_oldest_job(http_harness: HttpHarness, job_id: str) -> None:
    set_job(http_harness, job_id, queued_at=now() - timedelta(seconds=500), created_at=now() - timedelta(days=9))
    assert 500 <= (value(http_harness, 'post_queue_age_seconds{kind="distil"}') or 0) < 560
    assert value(http_harness, 'post_queue_age_seconds{kind="transfer"}') == 0
    lease = claim(http_harness, job_id)
    assert value(http_harness, 'post_queue_age_seconds{kind="distil"}') == 0
    with http_harness.database.write() as session:
        states.release(session, lease, reason="worker_stopped")
    assert (value(http_harness, 'post_queue_age_seconds{kind="distil"}') or 0) < 60, (
        "it waits anew, not since it was made"
    )


def test_a_lost_lease_is_counted_once_whoever_finds_it(http_harness: HttpHarness, job_id: str) -> None:
    """By the reconciler, or by the next worker that claims the job; a release is no loss."""
    series = "post_lease_losses_total"
    lease = claim(http_harness, job_id)
    with http_harness.database.write() as session:
        states.release(session, lease, reason="worker_stopped")
    assert value(http_harness, series) == 0
    lease = claim(http_harness, job_id)
    set_job(http_harness, job_id, lease_until=now() - timedelta(seconds=1))
    with http_harness.database.write() as session:
        assert states.take_back(session, job_id, lease.token, max_attempts=9) is not None
        assert states.take_back(session, job_id, lease.token, max_attempts=9) is None
    assert value(http_harness, series) == 1
    claim(http_harness, job_id)
    set_job(http_harness, job_id, lease_until=now() - timedelta(seconds=1))
    claim(http_harness, job_id)
    assert value(http_harness, series) == 2


def test_running_jobs_tell_their_pace(http_harness: HttpHarness, job_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty steps in five seconds are 0.25 s each; a job that has ended tells nothing."""
    clock = [100.0]
    monkeypatch.setattr("post_server.worker.progress.time.monotonic", lambda: clock[0])
    series = 'post_job_step_seconds{kind="distil",stage="distil"}'
    lease = claim(http_harness, job_id)
    report = ProgressWriter(http_harness.database, lease, lambda: None)
    report(Progress(10, 100, "distil", {}))
    assert value(http_harness, series) is None, "one report has no pace"
    clock[0] += 5.0
    report(Progress(30, 100, "distil", {}))
    assert value(http_harness, series) == 0.25
    with http_harness.database.write() as session:
        states.finish(session, lease, {})
    assert value(http_harness, series) is None
