"""A create request that is sent twice with one Idempotency-Key is executed once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import httpx
import pytest

from post_server.db.tables import IdempotencyRow, ModelRow, now
from tests.server.http_harness import ROWS, TASK, HttpHarness, code, prompt_bytes

REQUEST = {"model": "large", "dataset": "public", "task": TASK.model_dump()}
KEY = {"Idempotency-Key": "5f0c1d52-1c5e"}


@pytest.fixture
def student(http_harness: HttpHarness) -> ModelRow:
    http_harness.add_dataset()
    return http_harness.add_pair()[1]


def jobs(http_harness: HttpHarness) -> int:
    return len(http_harness("provider", "GET", "/v1/jobs").json()["items"])


def test_the_same_request_again_returns_the_same_job(http_harness: HttpHarness, student: ModelRow) -> None:
    first = http_harness("alice", "POST", "/v1/evaluations", json=REQUEST, headers=KEY)
    http_harness("alice", "POST", f"/v1/jobs/{first.json()['id']}/cancel")
    again = http_harness("alice", "POST", "/v1/evaluations", json=dict(reversed(REQUEST.items())), headers=KEY)
    assert (again.status_code, again.content) == (202, first.content)  # the first response, whatever has happened since
    assert again.headers["idempotent-replayed"] == "true"
    assert jobs(http_harness) == 1


def test_another_request_under_the_same_key_is_refused(http_harness: HttpHarness, student: ModelRow) -> None:
    http_harness("alice", "POST", "/v1/evaluations", json=REQUEST, headers=KEY)
    other = {**REQUEST, "max_rows": 5}
    assert code(http_harness("alice", "POST", "/v1/evaluations", json=other, headers=KEY)) == (
        422,
        "idempotency_mismatch",
    )
    pushed = http_harness("alice", "POST", "/v1/prompts", content=prompt_bytes(student.hash), headers=KEY)
    assert code(pushed) == (422, "idempotency_mismatch")
    assert jobs(http_harness) == 1
    assert http_harness("alice", "GET", "/v1/prompts").json()["items"] == []


def test_keys_of_different_callers_are_independent(http_harness: HttpHarness, student: ModelRow) -> None:
    ids = {
        http_harness(who, "POST", "/v1/evaluations", json=REQUEST, headers=KEY).json()["id"] for who in ("alice", "bob")
    }
    assert len(ids) == 2


def test_a_refused_request_may_be_corrected_under_its_key(http_harness: HttpHarness, student: ModelRow) -> None:
    wrong = http_harness("alice", "POST", "/v1/evaluations", json={**REQUEST, "dataset": "none"}, headers=KEY)
    assert wrong.status_code == 404
    assert http_harness("alice", "POST", "/v1/evaluations", json=REQUEST, headers=KEY).status_code == 202


def test_uploads_are_repeated_too(http_harness: HttpHarness, student: ModelRow) -> None:
    for who, path, content in (
        ("alice", "/v1/prompts", prompt_bytes(student.hash)),
        ("provider", "/v1/datasets?name=more&kind=rows", ROWS),
    ):
        first, again = (http_harness(who, "POST", path, content=content, headers=KEY) for _ in range(2))
        assert (first.status_code, again.status_code) == (201, 201)
        assert first.content == again.content
    changed = http_harness("provider", "POST", "/v1/datasets?name=less&kind=rows", content=ROWS, headers=KEY)
    assert code(changed) == (422, "idempotency_mismatch")


def test_a_request_in_flight_refuses_its_duplicate(http_harness: HttpHarness, student: ModelRow) -> None:
    begun, resume = threading.Event(), threading.Event()

    def slowly():  # type: ignore[no-untyped-def]
        yield ROWS
        begun.set()
        resume.wait(10)
        yield ROWS

    answers: list[httpx.Response] = []

    def upload() -> None:
        with httpx.Client(base_url=http_harness.url, trust_env=False, timeout=30) as client:
            headers = {**KEY, "Authorization": f"Bearer {http_harness.keys['provider']}"}
            path = "/v1/datasets?name=slow&kind=rows"
            answers.append(client.post(path, content=slowly(), headers=headers))

    thread = threading.Thread(target=upload)
    thread.start()
    assert begun.wait(10)
    while not http_harness.app.state.context.in_flight:
        pass
    second = http_harness("provider", "POST", "/v1/datasets?name=slow&kind=rows", content=ROWS * 2, headers=KEY)
    assert code(second) == (409, "request_in_flight")
    assert second.headers["retry-after"] == "1"
    resume.set()
    thread.join()
    assert answers[0].status_code == 201
    third = http_harness("provider", "POST", "/v1/datasets?name=slow&kind=rows", content=ROWS * 2, headers=KEY)
    assert (third.status_code, third.content) == (201, answers[0].content)


def test_many_duplicates_at_the_same_time_create_one_job(http_harness: HttpHarness, student: ModelRow) -> None:
    answers: list[httpx.Response] = []

    def send() -> None:
        headers = {**KEY, "Authorization": f"Bearer {http_harness.keys['alice']}"}
        with httpx.Client(base_url=http_harness.url, trust_env=False, timeout=30) as client:
            answers.append(client.post("/v1/evaluations", json=REQUEST, headers=headers))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert len({answer.content for answer in answers if answer.status_code == 202}) == 1
    assert jobs(http_harness) == 1


def test_another_process_waits_and_returns_the_same_response(http_harness: HttpHarness, student: ModelRow) -> None:
    """Executed again, the request would conflict with its first execution: a taken name, a full queue."""
    http_harness.add_dataset("words", b"a line\n", "corpus")
    other = http_harness.twin()

    def send(harness: HttpHarness, number: int) -> httpx.Response:
        headers = {"Idempotency-Key": f"request-{number}", "Authorization": f"Bearer {harness.keys['provider']}"}
        document = {"target": "large", "name": f"made-{number}", "corpus": ["words"], "keep_layers": 2, "steps": 1}
        url = f"{harness.url}/v1/distillations"
        return httpx.post(url, json=document, headers=headers, timeout=30, trust_env=False)

    try:
        with ThreadPoolExecutor(2) as both:
            for number in range(5):
                first, second = both.map(send, (http_harness, other), (number, number))
                assert (first.status_code, second.status_code) == (202, 202), (first.text, second.text)
                assert first.content == second.content
    finally:
        other.close()


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\u00e9"])
def test_a_key_is_printable_ascii_without_spaces(http_harness: HttpHarness, student: ModelRow, key: str) -> None:
    headers = {"Idempotency-Key": key.encode()}
    answer = http_harness("alice", "POST", "/v1/evaluations", json=REQUEST, headers=headers)  # type: ignore[arg-type]
    assert code(answer) == (422, "invalid_input")


def test_responses_expire_after_a_day(http_harness: HttpHarness, student: ModelRow) -> None:
    first = http_harness("alice", "POST", "/v1/evaluations", json=REQUEST, headers=KEY).json()["id"]
    with http_harness.database.write() as session:
        row = session.get_one(IdempotencyRow, (http_harness.key_ids["alice"], KEY["Idempotency-Key"]))
        row.created_at = now() - IdempotencyRow.kept - timedelta(minutes=1)
    assert http_harness("alice", "POST", "/v1/evaluations", json=REQUEST, headers=KEY).json()["id"] != first
