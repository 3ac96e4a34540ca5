"""What the client repeats and what it never repeats, with failures made on purpose."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from post_client import Client, build_upload
from post_shared.errors import Forbidden, IntegrityError, NotFound, PostError, TooManyRequests, Unavailable
from post_shared.files.prompt_file import read_prompt
from tests.server.http_harness import HttpHarness, prompt_bytes

Answer = Callable[[httpx.Request], httpx.Response]


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    document = {"type": f"urn:post:error:{code}", "title": "t", "status": status, "detail": "no", "code": code}
    return httpx.Response(
        status, content=json.dumps(document), headers={"content-type": "application/problem+json"} | headers
    )


class Failing(httpx.BaseTransport):
    """The real network, but for the first answers, which are made here or lost on the way."""

    def __init__(self, *answers: httpx.Response | Exception | None, lose: int = 0) -> None:
        self.answers = list(answers)
        self.lose = lose
        self.seen: list[httpx.Request] = []
        self._real = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            if answer is not None:
                return answer
        response = self._real.handle_request(request)
        if self.lose:
            self.lose -= 1
            response.read()
            response.close()
            raise httpx.ReadError("the answer was lost", request=request)
        return response

    def close(self) -> None:
        self._real.close()


def client_with(http_harness: HttpHarness, transport: Failing, who: str = "alice") -> Client:
    return Client(url=http_harness.url, api_key=http_harness.keys[who], transport=transport, attempts=3)


def test_a_busy_server_is_asked_again_after_the_time_it_names(http_harness: HttpHarness) -> None:
    http_harness.add_pair()
    failing = Failing(problem(503, "unavailable", **{"Retry-After": "0.4"}), problem(429, "too_many_requests"))
    before = time.monotonic()
    with client_with(http_harness, failing) as client:
        assert client.models.get("large").name == "large"
    assert len(failing.seen) == 3
    assert time.monotonic() - before >= 0.4


def test_retries_end(http_harness: HttpHarness) -> None:
    failing = Failing(*[problem(503, "unavailable", **{"Retry-After": "0"}) for _ in range(9)])
    with client_with(http_harness, failing) as client, pytest.raises(Unavailable):
        client.models.get("large")
    assert len(failing.seen) == 3


def test_a_create_whose_answer_is_lost_is_made_once(http_harness: HttpHarness) -> None:
    target, student = http_harness.add_pair()
    http_harness.add_dataset("public")
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"]) as client:
        prompt = client.prompts.upload(build_upload(read_prompt(prompt_bytes(student.hash))))
    failing = Failing(lose=1)
    with client_with(http_harness, failing) as client:
        job = client.transfers.create(prompt=prompt.id, target=target.name, dataset="public")
        assert [each.id for each in client.transfers.list()] == [job.id]
    keys = [request.headers["idempotency-key"] for request in failing.seen[:2]]
    assert keys[0] == keys[1]


def test_an_upload_whose_answer_is_lost_is_made_once(http_harness: HttpHarness, tmp_path: Path) -> None:
    _, student = http_harness.add_pair()
    with client_with(http_harness, Failing(lose=1)) as client:
        prompt = client.prompts.upload(build_upload(read_prompt(prompt_bytes(student.hash))))
        assert [each.id for each in client.prompts.list()] == [prompt.id]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "fine"}\n')
    with client_with(http_harness, Failing(lose=1), "provider") as client:
        made = client.datasets.create(name="again", kind="rows", content=rows)
        assert [each.id for each in client.datasets.list()] == [made.id]


def test_a_delete_is_never_repeated(http_harness: HttpHarness) -> None:
    failing = Failing(problem(503, "unavailable"))
    with client_with(http_harness, failing) as client, pytest.raises(Unavailable):
        client.prompts.delete("prm_x")
    assert len(failing.seen) == 1


@pytest.mark.parametrize("refusal", [problem(403, "forbidden"), problem(404, "not_found")])
def test_a_refusal_is_never_repeated(http_harness: HttpHarness, refusal: httpx.Response) -> None:
    failing = Failing(refusal)
    with client_with(http_harness, failing) as client, pytest.raises((Forbidden, NotFound)):
        client.models.get("large")
    assert len(failing.seen) == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (httpx.Response(200, text="<html>hello</html>"), IntegrityError),
        (httpx.Response(200, json={"id": "mod_1"}), IntegrityError),
        (httpx.Response(200, json=[]), IntegrityError),
        (httpx.Response(403, text="<html>proxy</html>"), Forbidden),
        (httpx.Response(418, text="teapot"), PostError),
        (
            httpx.Response(500, content=b"{broken", headers={"content-type": "application/problem+json"}),
            PostError,
        ),
        (httpx.Response(429, json=[1], headers={"content-type": "application/problem+json"}), TooManyRequests),
    ],
)
def test_odd_answers_become_errors_of_ours(
    http_harness: HttpHarness, answer: httpx.Response, kind: type[PostError]
) -> None:
    failing = Failing(*[answer] * 3)
    with client_with(http_harness, failing) as client, pytest.raises(kind):
        client.models.get("large")


def test_what_a_newer_server_adds_is_left_out(http_harness: HttpHarness) -> None:
    http_harness.add_pair()
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"]) as client:
        known: dict[str, Any] = client.models.get("large").model_dump(mode="json")
    with client_with(http_harness, Failing(httpx.Response(200, json=known | {"colour": "blue"}))) as client:
        assert client.models.get("large").model_dump(mode="json") == known
