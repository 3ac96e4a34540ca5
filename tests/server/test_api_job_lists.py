"""Filters over jobs and the series that they measured."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from post_server.jobs import states
from post_server.records import JobRow
from tests.server.front import TASK, Front, code

ORDER = {"model": "large", "dataset": "public", "task": TASK.model_dump()}


@pytest.fixture
def jobs(front: Front) -> list[str]:
    """Three evaluations of alice, oldest first, an hour apart; the first one cancelled, the second one running."""
    front.add_pair()
    front.add_dataset()
    made = [str(front("alice", "POST", "/v1/evaluations", json=ORDER).json()["id"]) for _ in range(3)]
    front("alice", "POST", f"/v1/jobs/{made[0]}/cancel")
    with front.database.write() as session:
        for hours, job in enumerate(reversed(made)):
            session.get_one(JobRow, job).created_at -= timedelta(hours=hours)
        _, lease = states.claim(session, made[1], lease_seconds=60, max_attempts=3) or pytest.fail("not claimed")
        for step in range(5):
            values = {"loss": 1 / (step + 1)} | ({"accuracy": 0.5} if step == 2 else {"odd": float("nan")})
            states.report(session, lease, progress=0.1, stage="measure", step=step, steps=5, metrics=values)
    return made


def ids(front: Front, who: str = "alice", **params: Any) -> list[str]:
    return [each["id"] for each in front(who, "GET", "/v1/jobs", params=params).json()["items"]]


def test_filters_go_together(front: Front, jobs: list[str]) -> None:
    first, second, third = jobs
    assert ids(front, state=["queued", "cancelled"]) == [third, first]
    assert ids(front, kind=["evaluate", "transfer"], state="running") == [second]
    at = front("alice", "GET", f"/v1/jobs/{second}").json()["created_at"]
    assert ids(front, since=at) == [third, second]
    assert ids(front, before=at) == [first]
    assert ids(front, since=at, before=at) == []
    assert ids(front, "bob", state=["queued", "running"]) == []  # a filter opens nothing
    assert ids(front, "provider", since=at) == [third, second]
    for bad in (
        {"since": "2026-01-01T00:00:00"},
        {"since": "0.5"},
        {"since": "0001-01-01T00:00:00+14:00"},
        {"before": "9999-12-31T23:59:59-14:00"},
        {"before": "1700000000"},
        {"before": "soon"},
        {"kind": ["evaluate", "x"]},
    ):
        assert code(front("alice", "GET", "/v1/jobs", params=bad)) == (422, "invalid_input")


def test_a_filter_holds_on_every_page(front: Front, jobs: list[str]) -> None:
    found, cursor = [], None
    while True:
        params = {"state": ["queued", "cancelled"], "limit": 1} | ({"cursor": cursor} if cursor else {})
        page = front("alice", "GET", "/v1/jobs", params=params).json()
        found += [each["id"] for each in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == [jobs[2], jobs[0]]


def test_metrics_are_series(front: Front, jobs: list[str]) -> None:
    whole = front("alice", "GET", f"/v1/jobs/{jobs[1]}/metrics").json()
    assert list(whole["series"]) == ["loss", "accuracy"]  # what was no number is no point
    assert [(point["step"], point["value"]) for point in whole["series"]["loss"]] == [
        (n, 1 / (n + 1)) for n in range(5)
    ]
    assert [(point["step"], point["stage"]) for point in whole["series"]["accuracy"]] == [(2, "measure")]
    events = front("alice", "GET", f"/v1/jobs/{jobs[1]}/events").json()["items"]
    sequences = [event["sequence"] for event in events if event["kind"] == "metrics"]
    assert [point["sequence"] for point in whole["series"]["loss"]] == sequences
    one = front("alice", "GET", f"/v1/jobs/{jobs[1]}/metrics?name=accuracy").json()
    assert one["series"] == {"accuracy": whole["series"]["accuracy"]}
    assert front("alice", "GET", f"/v1/jobs/{jobs[0]}/metrics").json()["series"] == {}
    assert code(front("bob", "GET", f"/v1/jobs/{jobs[1]}/metrics")) == (404, "not_found")


def test_pages_of_metrics_give_every_point_once(front: Front, jobs: list[str]) -> None:
    path, points, cursor = f"/v1/jobs/{jobs[1]}/metrics", [], None
    while True:
        page = front("alice", "GET", path, params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        points += page["series"]["loss"]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert points == front("alice", "GET", path).json()["series"]["loss"]
    assert code(front("alice", "GET", path, params={"cursor": "x"})) == (422, "invalid_input")
