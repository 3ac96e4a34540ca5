"""Filters of jobs, and the series of their metrics."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from post_server.db.tables import JobRow
from post_server.jobs import states
from tests.server.http_harness import TASK, HttpHarness, code

BODY = {"model": "large", "dataset": "public", "task": TASK.model_dump()}


@pytest.fixture
def jobs(http_harness: HttpHarness) -> list[str]:
    """Three evaluations of alice, oldest first, an hour apart; the first one cancelled, the second one running."""
    http_harness.add_pair()
    http_harness.add_dataset()
    jobs = [str(http_harness("alice", "POST", "/v1/evaluations", json=BODY).json()["id"]) for _ in range(3)]
    http_harness("alice", "POST", f"/v1/jobs/{jobs[0]}/cancel")
    with http_harness.database.write() as session:
        for hours, job in enumerate(reversed(jobs)):
            session.get_one(JobRow, job).created_at -= timedelta(hours=hours)
        _, lease = states.claim(session, jobs[1], lease_seconds=60, max_attempts=3) or pytest.fail("not claimed")
        for step in range(5):
            values = {"loss": 1 / (step + 1)} | ({"accuracy": 0.5} if step == 2 else {"odd": float("nan")})
            states.record_progress(session, lease, progress=0.1, stage="measure", step=step, steps=5, metrics=values)
    return jobs


def ids(http_harness: HttpHarness, who: str = "alice", **params: Any) -> list[str]:
    return [each["id"] for each in http_harness(who, "GET", "/v1/jobs", params=params).json()["items"]]


def test_filters_are_combined(http_harness: HttpHarness, jobs: list[str]) -> None:
    first, second, third = jobs
    assert ids(http_harness, state=["queued", "cancelled"]) == [third, first]
    assert ids(http_harness, kind=["evaluate", "transfer"], state="running") == [second]
    at = http_harness("alice", "GET", f"/v1/jobs/{second}").json()["created_at"]
    assert ids(http_harness, since=at) == [third, second]
    assert ids(http_harness, before=at) == [first]
    assert ids(http_harness, since=at, before=at) == []
    assert ids(http_harness, "bob", state=["queued", "running"]) == []  # a filter reveals nothing
    assert ids(http_harness, "provider", since=at) == [third, second]
    for bad in (
        {"since": "2026-01-01T00:00:00"},
        {"since": "0.5"},
        {"since": "0001-01-01T00:00:00+14:00"},
        {"before": "9999-12-31T23:59:59-14:00"},
        {"before": "1700000000"},
        {"before": "soon"},
        {"kind": ["evaluate", "x"]},
    ):
        assert code(http_harness("alice", "GET", "/v1/jobs", params=bad)) == (422, "invalid_input")


def test_a_filter_applies_to_every_page(http_harness: HttpHarness, jobs: list[str]) -> None:
    page_ids, cursor = [], None
    while True:
        params = {"state": ["queued", "cancelled"], "limit": 1} | ({"cursor": cursor} if cursor else {})
        page = http_harness("alice", "GET", "/v1/jobs", params=params).json()
        page_ids += [each["id"] for each in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert page_ids == [jobs[2], jobs[0]]


def test_metrics_are_series(http_harness: HttpHarness, jobs: list[str]) -> None:
    whole = http_harness("alice", "GET", f"/v1/jobs/{jobs[1]}/metrics").json()
    assert list(whole["series"]) == ["loss", "accuracy"]  # NaN values are left out
    assert [(point["step"], point["value"]) for point in whole["series"]["loss"]] == [
        (n, 1 / (n + 1)) for n in range(5)
    ]
    assert [(point["step"], point["stage"]) for point in whole["series"]["accuracy"]] == [(2, "measure")]
    events = http_harness("alice", "GET", f"/v1/jobs/{jobs[1]}/events").json()["items"]
    sequences = [event["sequence"] for event in events if event["kind"] == "metrics"]
    assert [point["sequence"] for point in whole["series"]["loss"]] == sequences
    one = http_harness("alice", "GET", f"/v1/jobs/{jobs[1]}/metrics?name=accuracy").json()
    assert one["series"] == {"accuracy": whole["series"]["accuracy"]}
    assert http_harness("alice", "GET", f"/v1/jobs/{jobs[0]}/metrics").json()["series"] == {}
    assert code(http_harness("bob", "GET", f"/v1/jobs/{jobs[1]}/metrics")) == (404, "not_found")


def test_pages_of_metrics_give_every_point_once(http_harness: HttpHarness, jobs: list[str]) -> None:
    path, points, cursor = f"/v1/jobs/{jobs[1]}/metrics", [], None
    while True:
        page = http_harness("alice", "GET", path, params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        points += page["series"]["loss"]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert points == http_harness("alice", "GET", path).json()["series"]["loss"]
    assert code(http_harness("alice", "GET", path, params={"cursor": "x"})) == (422, "invalid_input")
