"""Trade-off reports: only for the provider, checked requests, and the document of a finished report."""

from __future__ import annotations

from typing import Any

import pytest

from post_server.db.tables import JobRow, ModelRow
from post_server.jobs import states
from post_shared.schemas.jobs import JobKind, JobState
from post_shared.schemas.tuning import TuneOptions
from tests.server.http_harness import TASK, HttpHarness, code

ORDER: dict[str, Any] = {
    "student": "small",
    "tasks": [{"dataset": "public", "task": TASK.model_dump()}],
    "members": ["seen"],
    "non_members": ["unseen"],
}


@pytest.fixture
def ready(http_harness: HttpHarness) -> HttpHarness:
    http_harness.add_pair()
    http_harness.add_dataset()
    http_harness.add_dataset("seen", b"One text.\n", "corpus")
    http_harness.add_dataset("seen-again", b"One text.\n", "corpus")
    http_harness.add_dataset("unseen", b"Another text.\n", "corpus")
    return http_harness


def test_a_request_becomes_a_queued_job(ready: HttpHarness) -> None:
    answer = ready("provider", "POST", "/v1/reports", json=ORDER)
    assert answer.status_code == 202
    job = answer.json()
    assert (job["kind"], job["state"], job["request"]["student"]) == ("report", "queued", "small")
    assert [item["id"] for item in ready("provider", "GET", "/v1/jobs?kind=report").json()["items"]] == [job["id"]]


def test_an_owner_can_neither_request_nor_see_a_report(ready: HttpHarness) -> None:
    before = ready.everything()
    assert code(ready("alice", "POST", "/v1/reports", json=ORDER)) == (403, "forbidden")
    assert ready.everything() == before
    job = ready("provider", "POST", "/v1/reports", json=ORDER).json()["id"]
    assert code(ready("alice", "GET", f"/v1/reports/{job}")) == (403, "forbidden")
    assert code(ready("alice", "GET", f"/v1/jobs/{job}")) == (404, "not_found")
    assert code(ready(None, "GET", f"/v1/reports/{job}")) == (401, "unauthenticated")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"student": "none"}, (404, "not_found")),
        ({"student": "large"}, (404, "not_found")),
        ({"tasks": []}, (422, "invalid_input")),
        ({"tasks": [{"dataset": "none", "task": TASK.model_dump()}]}, (404, "not_found")),
        ({"tasks": [{"dataset": "seen", "task": TASK.model_dump()}]}, (422, "invalid_input")),  # no labels
        ({"tasks": ORDER["tasks"] * 2}, (422, "invalid_input")),
        ({"tasks": [{"dataset": "public", "task": {"template": "{text}"}}]}, (422, "invalid_input")),
        (
            {"tasks": [{"dataset": "public", "task": {"template": "{text}", "label_words": {"a": ["b"], "c": ["d"]}}}]},
            (422, "invalid_input"),
        ),
        ({"tasks": [{"dataset": "public", "task": {"template": "no slot"}}]}, (422, "task_invalid")),
        ({"members": []}, (422, "invalid_input")),
        ({"members": ["none"]}, (404, "not_found")),
        ({"members": ["seen", "unseen"]}, (422, "invalid_input")),
        ({"non_members": ["seen-again"]}, (422, "invalid_input")),  # the same bytes under another name
        ({"texts": 0}, (422, "invalid_input")),
        ({"stpes": 5}, (422, "invalid_input")),
    ],
)
def test_an_invalid_request_is_refused(ready: HttpHarness, change: dict[str, Any], expected: tuple[int, str]) -> None:
    before = ready.everything()
    assert code(ready("provider", "POST", "/v1/reports", json={**ORDER, **change})) == expected
    assert ready.everything() == before


def test_a_text_that_the_student_was_distilled_on_is_no_non_member(ready: HttpHarness) -> None:
    with ready.database.write() as session:
        student = session.query(ModelRow).filter_by(name="small").one()
        session.add(
            JobRow(
                kind=JobKind.DISTIL,
                request={"corpus": ["unseen"]},
                owner_key_id=ready.key_ids["provider"],
                state=JobState.SUCCEEDED,
                result={"model_id": student.id},
            )
        )
    refused = ready("provider", "POST", "/v1/reports", json=ORDER)
    assert code(refused) == (422, "invalid_input")
    assert "distilled on unseen" in refused.json()["detail"]


def test_a_report_exists_once_its_job_has_succeeded(ready: HttpHarness) -> None:
    job = ready("provider", "POST", "/v1/reports", json=ORDER).json()["id"]
    assert code(ready("provider", "GET", f"/v1/reports/{job}")) == (409, "conflict")
    assert code(ready("provider", "GET", "/v1/reports/job_none")) == (404, "not_found")
    with ready.database.write() as session:
        _, lease = states.claim(session, job, lease_seconds=60, max_attempts=3) or pytest.fail("not claimed")
        states.finish(session, lease, example(job))
    assert ready("provider", "GET", f"/v1/reports/{job}").json() == example(job)
    other = ready("provider", "POST", "/v1/evaluations", json={"model": "large", **ORDER["tasks"][0]}).json()["id"]
    assert code(ready("provider", "GET", f"/v1/reports/{other}")) == (404, "not_found")


def example(job: str = "job_1", *, non_members: int = 24) -> dict[str, Any]:
    """A report with made-up figures, as a worker stores it in its job."""
    size = {"id": "mod_1", "name": "large", "hash": "ab" * 32, "layers": 4, "parameters": 1000, "size_bytes": 4000}
    estimate = {"value": 0.75, "low": 0.5, "high": 1.0}
    names = ("target_zero_shot", "target_tuned", "student_zero_shot", "student_tuned", "gap", "gap_zero_shot")
    names += ("target_calibrated", "gap_calibrated")
    attack = {"auc": estimate, "tpr": estimate}
    leakage = [
        {"score": score, "share": share, "target": attack, "student": attack, "auc_drop": estimate}
        for score in ("min_k", "min_k_plus")
        for share in (0.2, 1.0)
    ]
    counts = {"dataset": "public", "tune_rows": 20, "test_rows": 20, "majority": 0.5}
    filled = {"tune_rows": 9, "test_rows": 9, "texts": 9}
    tuning = TuneOptions(steps=9, batch_size=9, learning_rate=0.1, num_virtual_tokens=9, max_length=9).model_dump()
    return {
        "job_id": job,
        "made_at": "2025-01-01T00:00:00Z",
        "target": size,
        "student": {**size, "name": "small", "layers": 2, "parameters": 600, "size_bytes": 2400},
        "parameter_share": 0.6,
        "byte_share": 0.6,
        "recorded_loss": {"job_id": "job_0", "corpus": ["seen"], "losses": {"ce": 1.25}},
        "measured_loss": {"ce": 1.5, "lm": 3.0, "cos": 0.25, "tokens": 400},
        "tasks": [{**counts, **dict.fromkeys(names, estimate)}],
        "members": 24,
        "non_members": non_members,
        "leakage": leakage,
        "request": {**ORDER, **filled, "tuning": tuning, "seed": 0},
    }
