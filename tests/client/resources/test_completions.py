"""Streamed completions: what a stream may contain, and what it may not."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from post_client import Client
from post_shared.errors import IntegrityError, InvalidInput, PostError, TooManyRequests

CHUNK = {"id": "cmpl-1", "created": 1, "model": "large", "choices": [{"index": 0, "text": "good"}]}
PROBLEM = {"code": "too_many_requests", "detail": "busy", "status": 429, "type": "t", "title": "t"}


def client(*events: str, requests: list[httpx.Request] | None = None) -> Client:
    """A client of a server that streams these events."""

    def respond(request: httpx.Request) -> httpx.Response:
        if requests is not None:
            requests.append(request)
        content = "".join(f"{event}\r\n\r\n" for event in events).encode()
        return httpx.Response(200, content=content, headers={"content-type": "text/event-stream"})

    return Client(url="http://server", api_key="post_x", transport=httpx.MockTransport(respond))


def test_chunks_are_yielded_until_the_end() -> None:
    requests: list[httpx.Request] = []
    events = (": ping", f"data: {json.dumps(CHUNK)}", f"data:{json.dumps(CHUNK | {'new': 1})}", "data: [DONE]")
    chunks = list(client(*events, requests=requests).completions.stream(model="large:prm_1", prompt="x", max_tokens=2))
    assert [chunk.choices[0].text for chunk in chunks] == ["good", "good"]
    sent = json.loads(requests[0].content)
    assert (sent["prompt"], sent["stream"], sent["max_tokens"]) == (["x"], True, 2)


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (json.dumps({"error": PROBLEM}), TooManyRequests),
        (json.dumps({"error": {"code": "new", "detail": "x"}}), PostError),
        ("{", IntegrityError),
        ("[]", IntegrityError),
        (json.dumps({"id": 5}), IntegrityError),
    ],
)
def test_an_error_after_the_first_chunk_is_raised(event: str, kind: type[PostError]) -> None:
    stream = client(f"data: {json.dumps(CHUNK)}", f"data: {event}").completions.stream(model="large", prompt="x")
    assert next(stream).choices[0].text == "good"
    with pytest.raises(kind):
        next(stream)


def test_an_incomplete_stream_is_an_error() -> None:
    with pytest.raises(IntegrityError, match="ended before"):
        list(client(f"data: {json.dumps(CHUNK)}").completions.stream(model="large", prompt="x"))


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"maxtokens": 1}, {"prompt": []}])
def test_invalid_options_are_not_sent(options: dict[str, Any]) -> None:
    requests: list[httpx.Request] = []
    with pytest.raises(InvalidInput):
        client(requests=requests).completions.create(**({"model": "large", "prompt": "x"} | options))
    assert requests == []
