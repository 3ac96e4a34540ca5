"""Prometheus metrics: queue ages, step times and lost leases, read from the rows."""

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
    """The value of a series in /metrics; None if it is missing."""
    match = re.search(rf"^{re.escape(series)} (\S+)$", http_harness(None, "GET", "/metrics").text, re.MULTILINE)
    return float(match[1]) if match else None


def claim(http_harness: HttpHarness, job_id: str) -> states.Lease:
    with http_harness.database.write() as session:
        claimed = states.claim(session, job_id, lease_seconds=30.0, max_attempts=9)
    assert claimed is not None
    return claimed[1]


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
        "its age starts anew when it is queued again"
    )


def test_a_lost_lease_is_counted_once(http_harness: HttpHarness, job_id: str) -> None:
    """Found by the reconciler or by the next worker that claims the job; a release isn't counted."""
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


def test_running_jobs_report_step_times(
    http_harness: HttpHarness, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps in 5 seconds are 0.25 s each; a finished job reports nothing."""
    clock = [100.0]
    monkeypatch.setattr("post_server.worker.progress.time.monotonic", lambda: clock[0])
    series = 'post_job_step_seconds{kind="distil",stage="distil"}'
    lease = claim(http_harness, job_id)
    writer = ProgressWriter(http_harness.database, lease, lambda: None)
    writer(Progress(10, 100, "distil", {}))
    assert value(http_harness, series) is None, "one report gives no step time"
    clock[0] += 5.0
    writer(Progress(30, 100, "distil", {}))
    assert value(http_harness, series) == 0.25
    with http_harness.database.write() as session:
        states.finish(session, lease, {})
    assert value(http_harness, series) is None
