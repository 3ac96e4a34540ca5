"""Requests and replies between the API process and the predictors, over Redis lists. Never imports torch.

A request is JSON in one list: ``{"reply": key, "deadline": seconds since 1970, "kind": …, "payload": {...}}``. The
replies are JSON in a list of their own that expires: any number of ``{"part": {...}}``, if the request asks for a
stream, and finally ``{"ok": {...}}`` or ``{"problem": {...}}``. A caller that stops waiting sets a key beside that
list, and the predictor drops the request. Texts pass through the memory of a private Redis and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Literal
from weakref import WeakKeyDictionary

import anyio
from redis.asyncio import Redis
from redis.exceptions import RedisError

from post_server.settings import Settings, get_settings
from post_shared.errors import Cancelled, PostError, Timeout, TooManyRequests, Unavailable, from_problem
from post_shared.schemas.common import Document
from post_shared.schemas.completions import CompletionCreate

QUESTIONS = "post:predictor:questions"
ALIVE = "post:predictor:alive"
"""Every predictor renews this key; without it, none is running."""
ALIVE_SECONDS = 6
KEPT_SECONDS = 600
"""How long a request's keys are kept: the predictor that took it, and that its caller is gone."""
_POLL_SECONDS = 1.0
"""How often a waiting request checks that its predictor and its caller are still there."""
_RETRY_SECONDS = 2

Kind = Literal["prediction", "completion"]
IsGone = Callable[[], Awaitable[bool]]
"""Whether the caller has disconnected."""

_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Redis]] = WeakKeyDictionary()


class CompletionQuestion(Document):
    """A completion request whose model and prompt are ids."""

    model: str
    prompt: str | None
    form: CompletionCreate


def alive_key(predictor: str) -> str:
    """The key that this predictor renews."""
    return f"{ALIVE}:{predictor}"


def taken_key(reply: str) -> str:
    """The key that names the predictor that took the request."""
    return f"{reply}:taken"


def gone_key(reply: str) -> str:
    """The key that marks that nobody waits at ``reply`` any more."""
    return f"{reply}:gone"


async def request(
    payload: dict[str, Any],
    timeout: float | None = None,
    *,
    settings: Settings | None = None,
    kind: Kind = "prediction",
    is_gone: IsGone | None = None,
) -> dict[str, Any]:
    """Send a request to the predictors and wait for the whole answer; see :func:`replies`."""
    async with aclosing(replies(payload, timeout, settings=settings, kind=kind, is_gone=is_gone)) as stream:
        async for reply in stream:
            if "ok" in reply:
                return dict(reply["ok"])
    raise Unavailable("the predictor's answer is incomplete; try again")


async def replies(
    payload: dict[str, Any],
    timeout: float | None = None,
    *,
    settings: Settings | None = None,
    kind: Kind = "prediction",
    is_gone: IsGone | None = None,
) -> AsyncGenerator[dict[str, Any]]:
    """Send a request to the predictors; yields every ``part`` as it arrives, and finally ``ok``.

    ``payload`` is a ``PredictionCreate`` document whose ``model`` and ``prompt`` are ids, or a
    :class:`CompletionQuestion`. Closing the generator early makes the predictor stop.

    Raises:
        Unavailable: no predictor is running, or the one that took the request is gone.
        Timeout: no predictor answered in time.
        TooManyRequests: the queue is full.
        Cancelled: the caller is gone, by ``is_gone``.
        PostError: the predictor's error, for example :class:`~post_shared.errors.PromptMismatch`.
    """
    settings = settings or get_settings()
    seconds = settings.prediction_seconds if timeout is None else timeout
    client = _client(settings)
    reply = f"post:predictor:answer:{secrets.token_hex(16)}"
    ended = True
    try:
        await _check_queue(client, settings.predictor_queue)
        message = {"reply": reply, "deadline": time.time() + seconds, "kind": kind, "payload": payload}
        await client.lpush(QUESTIONS, json.dumps(message))
        ended = False
        deadline = time.monotonic() + seconds
        while not ended:
            document = await _next(client, reply, deadline, seconds, is_gone)
            ended = "part" not in document
            if "problem" in document:
                raise from_problem(document["problem"])
            yield document
    except (RedisError, OSError) as error:
        raise Unavailable(f"the predictors can't be reached ({type(error).__name__}); try again") from error
    finally:
        if not ended:
            await _mark_gone(client, reply)


async def alive(settings: Settings | None = None) -> bool:
    """Whether a predictor has renewed its key within the last seconds."""
    try:
        return bool(await _client(settings or get_settings()).exists(ALIVE))
    except (RedisError, OSError):
        return False


async def close() -> None:
    """Close this event loop's connections."""
    for client in _clients.pop(asyncio.get_running_loop(), {}).values():
        await client.aclose()


async def _check_queue(client: Redis, max_waiting: int) -> None:
    async with client.pipeline(transaction=False) as pipe:
        pipe.exists(ALIVE)
        pipe.llen(QUESTIONS)
        running, waiting = await pipe.execute()
    if not running:
        raise Unavailable("no predictor is running; it may be starting: try again in a few seconds")
    if waiting >= max_waiting:
        raise TooManyRequests(f"{waiting} requests are already waiting; try again later", retry_after=_RETRY_SECONDS)


async def _next(client: Redis, reply: str, deadline: float, seconds: float, is_gone: IsGone | None) -> dict[str, Any]:
    while (remaining := deadline - time.monotonic()) > 0:
        item = await client.brpop([reply], timeout=min(_POLL_SECONDS, max(0.05, remaining)))
        if item is not None:
            return dict(json.loads(item[1]))
        taken = await client.get(taken_key(reply))
        if not await client.exists(ALIVE if taken is None else alive_key(_text(taken))):
            raise Unavailable("the predictor stopped before it answered; try again")
        if is_gone is not None and await is_gone():
            raise Cancelled("the caller is gone")
    raise Timeout(f"no answer within {seconds:g} s; ask for fewer texts or tokens, or try again later")


async def _mark_gone(client: Redis, reply: str) -> None:
    """Tell the predictor that the caller is gone, even while this task is being cancelled."""
    with anyio.CancelScope(shield=True):
        try:
            await client.set(gone_key(reply), 1, ex=KEPT_SECONDS)
        except (RedisError, OSError):
            return  # the request's own deadline ends it


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _client(settings: Settings) -> Redis:
    clients = _clients.setdefault(asyncio.get_running_loop(), {})
    if settings.redis_url not in clients:
        clients[settings.redis_url] = Redis.from_url(
            settings.redis_url, socket_connect_timeout=2.0, socket_timeout=_POLL_SECONDS + 5.0
        )
    return clients[settings.redis_url]


def part(document: dict[str, Any]) -> str:
    """The message of a part of an answer."""
    return json.dumps({"part": document})


def answer(result: dict[str, Any]) -> str:
    """The message of a whole answer."""
    return json.dumps({"ok": result})


def refusal(error: PostError) -> str:
    """The message of an error."""
    return json.dumps({"problem": error.problem()})
