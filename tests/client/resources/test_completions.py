"""Completions piece by piece: what a stream may hold, and what it may not."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from post_client import Client
from post_shared.errors import IntegrityError, InvalidInput, PostError, TooManyRequests

PIECE = {"id": "cmpl-1", "created": 1, "model": "large", "choices": [{"index": 0, "text": "good"}]}
PROBLEM = {"code": "too_many_requests", "detail": "busy", "status": 429, "type": "t", "title": "t"}


def client(*events: str, asked: list[httpx.Request] | None = None) -> Client:
    """Of a server that streams these events."""

    def answer(request: httpx.Request) -> httpx.Response:
        if asked is not None:
            asked.append(request)
        content = "".join(f"{event}\r\n\r\n" for event in events).encode()
        return httpx.Response(200, content=content, headers={"content-type": "text/event-stream"})

    return Client(url="http://server", api_key="post_x", transport=httpx.MockTransport(answer))


def test_pieces_come_one_by_one_until_the_end() -> None:
    asked: list[httpx.Request] = []
    events = (": ping", f"data: {json.dumps(PIECE)}", f"data:{json.dumps(PIECE | {'new': 1})}", "data: [DONE]")
    pieces = list(client(*events, asked=asked).completions.stream(model="large:prm_1", prompt="x", max_tokens=2))
    assert [piece.choices[0].text for piece in pieces] == ["good", "good"]
    sent = json.loads(asked[0].content)
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
def test_what_goes_wrong_later_is_an_error_too(event: str, kind: type[PostError]) -> None:
    stream = client(f"data: {json.dumps(PIECE)}", f"data: {event}").completions.stream(model="large", prompt="x")
    assert next(stream).choices[0].text == "good"
    with pytest.raises(kind):
        next(stream)


def test_half_a_completion_is_not_taken_for_a_whole_one() -> None:
    with pytest.raises(IntegrityError, match="ended before"):
        list(client(f"data: {json.dumps(PIECE)}").completions.stream(model="large", prompt="x"))


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"maxtokens": 1}, {"prompt": []}])
def test_impossible_options_are_not_sent(options: dict[str, Any]) -> None:
    asked: list[httpx.Request] = []
    with pytest.raises(InvalidInput):
        client(asked=asked).completions.create(**({"model": "large", "prompt": "x"} | options))
    assert asked == []
