"""Questions and answers between the API process and the predictors, over Redis lists.

A question is JSON in one list: ``{"reply": key, "deadline": seconds since 1970, "payload": {...}}``; its answer
is JSON in a list of its own that expires: ``{"ok": {...}}`` or ``{"problem": {...}}``. Texts pass through the
memory of a private Redis and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import Any
from weakref import WeakKeyDictionary

from redis.asyncio import Redis
from redis.exceptions import RedisError

from post_server.settings import Settings, get_settings
from post_shared.errors import PostError, Timeout, TooManyRequests, Unavailable, from_problem

QUESTIONS = "post:predictor:questions"
ALIVE = "post:predictor:alive"
"""Every predictor renews this key; when it's gone, none is there."""
ALIVE_SECONDS = 6
_LOOK_SECONDS = 1.0
"""How often a waiting request asks whether a predictor is still there."""

_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Redis]] = WeakKeyDictionary()


async def request(
    payload: dict[str, Any], timeout: float | None = None, *, settings: Settings | None = None
) -> dict[str, Any]:
    """Ask the predictors; the answer is a :class:`post_shared.schemas.Predictions` document.

    ``payload`` is a ``PredictionCreate`` document whose ``model`` and ``prompt`` are ids.

    Raises:
        Unavailable: no predictor is there, or the one that had the question is gone.
        Timeout: none answered in time.
        TooManyRequests: as many requests as may wait are waiting.
        PostError: whatever the predictor says, for example :class:`~post_shared.errors.PromptMismatch`.
    """
    known = settings or get_settings()
    seconds = known.prediction_seconds if timeout is None else timeout
    client = _client(known)
    try:
        answer = await _ask(client, payload, seconds, known.predictor_queue)
    except (RedisError, OSError) as error:
        raise Unavailable(f"the predictors can't be reached ({type(error).__name__}); try again") from error
    if "problem" in answer:
        raise from_problem(answer["problem"])
    return dict(answer["ok"])


async def alive(settings: Settings | None = None) -> bool:
    """Whether some predictor has given a sign of life within the last seconds."""
    try:
        return bool(await _client(settings or get_settings()).exists(ALIVE))
    except (RedisError, OSError):
        return False


async def close() -> None:
    """Close the connections of this event loop."""
    for client in _clients.pop(asyncio.get_running_loop(), {}).values():
        await client.aclose()


async def _ask(client: Redis, payload: dict[str, Any], seconds: float, most_waiting: int) -> dict[str, Any]:
    async with client.pipeline(transaction=False) as pipe:
        pipe.exists(ALIVE)
        pipe.llen(QUESTIONS)
        found, waiting = await pipe.execute()
    if not found:
        raise Unavailable("no predictor is running; it may be starting: try again in some seconds")
    if waiting >= most_waiting:
        raise TooManyRequests(f"{waiting} requests wait for a prediction already; come back later", retry_after=2)
    reply = f"post:predictor:answer:{secrets.token_hex(16)}"
    question = {"reply": reply, "deadline": time.time() + seconds, "payload": payload}
    await client.lpush(QUESTIONS, json.dumps(question))
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        found = await _brpop(client, reply, min(_LOOK_SECONDS, max(0.05, left)))
        if found is not None:
            return dict(json.loads(found))
        if not await client.exists(ALIVE):
            raise Unavailable("the predictor went away before it answered; try again")
    raise Timeout(f"no prediction within {seconds:g} s; ask for fewer texts at once, or try again later")


async def _brpop(client: Redis, key: str, seconds: float) -> bytes | str | None:
    found = await client.brpop([key], timeout=seconds)
    return None if found is None else found[1]


def _client(settings: Settings) -> Redis:
    clients = _clients.setdefault(asyncio.get_running_loop(), {})
    if settings.redis_url not in clients:
        clients[settings.redis_url] = Redis.from_url(
            settings.redis_url, socket_connect_timeout=2.0, socket_timeout=_LOOK_SECONDS + 5.0
        )
    return clients[settings.redis_url]


def answer(result: dict[str, Any]) -> str:
    """An answer as it travels."""
    return json.dumps({"ok": result})


def refusal(error: PostError) -> str:
    """An error as it travels."""
    return json.dumps({"problem": error.problem()})
