"""Which requests the client retries and which it never retries, with injected failures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from post_client import Client, build_upload
from post_shared.errors import Forbidden, IntegrityError, NotFound, PostError, TooManyRequests, Unavailable
from post_shared.files.prompt_file import read_prompt
from tests.server.http_harness import HttpHarness, prompt_bytes


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    document = {"type": f"urn:post:error:{code}", "title": "t", "status": status, "detail": "no", "code": code}
    return httpx.Response(
        status, content=json.dumps(document), headers={"content-type": "application/problem+json"} | headers
    )


class Failing(httpx.BaseTransport):
    """The real network, except for the first responses, which are given, and ``lose`` responses, which are lost."""

    def __init__(self, *responses: httpx.Response | Exception | None, lose: int = 0) -> None:
        self.responses = list(responses)
        self.lose = lose
        self.requests: list[httpx.Request] = []
        self._real = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.responses:
            given = self.responses.pop(0)
            if isinstance(given, Exception):
                raise given
            if given is not None:
                return given
        response = self._real.handle_request(request)
        if self.lose:
            self.lose -= 1
            response.read()
            response.close()
            raise httpx.ReadError("the response was lost", request=request)
        return response

    def close(self) -> None:
        self._real.close()


def client_with(http_harness: HttpHarness, transport: Failing, who: str = "alice") -> Client:
    return Client(url=http_harness.url, api_key=http_harness.keys[who], transport=transport, attempts=3)


def test_a_busy_server_is_retried_after_the_time_it_names(http_harness: HttpHarness) -> None:
    http_harness.add_pair()
    failing = Failing(problem(503, "unavailable", **{"Retry-After": "0.4"}), problem(429, "too_many_requests"))
    before = time.monotonic()
    with client_with(http_harness, failing) as client:
        assert client.models.get("large").name == "large"
    assert len(failing.requests) == 3
    assert time.monotonic() - before >= 0.4


def test_retries_end(http_harness: HttpHarness) -> None:
    failing = Failing(*[problem(503, "unavailable", **{"Retry-After": "0"}) for _ in range(9)])
    with client_with(http_harness, failing) as client, pytest.raises(Unavailable):
        client.models.get("large")
    assert len(failing.requests) == 3


def test_a_create_whose_response_is_lost_takes_effect_once(http_harness: HttpHarness) -> None:
    target, student = http_harness.add_pair()
    http_harness.add_dataset("public")
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"]) as client:
        prompt = client.prompts.upload(build_upload(read_prompt(prompt_bytes(student.hash))))
    failing = Failing(lose=1)
    with client_with(http_harness, failing) as client:
        job = client.transfers.create(prompt=prompt.id, target=target.name, dataset="public")
        assert [each.id for each in client.transfers.list()] == [job.id]
    keys = [request.headers["idempotency-key"] for request in failing.requests[:2]]
    assert keys[0] == keys[1]


def test_an_upload_whose_response_is_lost_takes_effect_once(http_harness: HttpHarness, tmp_path: Path) -> None:
    _, student = http_harness.add_pair()
    with client_with(http_harness, Failing(lose=1)) as client:
        prompt = client.prompts.upload(build_upload(read_prompt(prompt_bytes(student.hash))))
        assert [each.id for each in client.prompts.list()] == [prompt.id]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "fine"}\n')
    with client_with(http_harness, Failing(lose=1), "provider") as client:
        created = client.datasets.create(name="again", kind="rows", content=rows)
        assert [each.id for each in client.datasets.list()] == [created.id]


def test_a_delete_is_never_retried(http_harness: HttpHarness) -> None:
    failing = Failing(problem(503, "unavailable"))
    with client_with(http_harness, failing) as client, pytest.raises(Unavailable):
        client.prompts.delete("prm_x")
    assert len(failing.requests) == 1


@pytest.mark.parametrize("refusal", [problem(403, "forbidden"), problem(404, "not_found")])
def test_a_refusal_is_never_retried(http_harness: HttpHarness, refusal: httpx.Response) -> None:
    failing = Failing(refusal)
    with client_with(http_harness, failing) as client, pytest.raises((Forbidden, NotFound)):
        client.models.get("large")
    assert len(failing.requests) == 1


@pytest.mark.parametrize(
    ("response", "kind"),
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
def test_unexpected_responses_become_typed_errors(
    http_harness: HttpHarness, response: httpx.Response, kind: type[PostError]
) -> None:
    failing = Failing(*[response] * 3)
    with client_with(http_harness, failing) as client, pytest.raises(kind):
        client.models.get("large")


def test_members_added_by_a_newer_server_are_ignored(http_harness: HttpHarness) -> None:
    http_harness.add_pair()
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"]) as client:
        known: dict[str, Any] = client.models.get("large").model_dump(mode="json")
    with client_with(http_harness, Failing(httpx.Response(200, json=known | {"colour": "blue"}))) as client:
        assert client.models.get("large").model_dump(mode="json") == known
