"""Questions and answers between the API process and the predictors, over Redis lists. Never imports torch.

A question is JSON in one list: ``{"reply": key, "deadline": seconds since 1970, "kind": …, "payload": {...}}``. What
comes back is JSON in a list of its own that expires: any number of ``{"part": {...}}``, if the question asks for a
stream, and at last ``{"ok": {...}}`` or ``{"problem": {...}}``. Whoever stops waiting sets a key beside that list, and
the predictor works on it no more. Texts pass through the memory of a private Redis and nothing else.
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
"""Every predictor renews this key; when it's gone, none is there."""
ALIVE_SECONDS = 6
KEPT_SECONDS = 600
"""How long is remembered who has a question, and that nobody waits for its answer."""
_LOOK_SECONDS = 1.0
"""How often a waiting request asks whether a predictor, and its caller, are still there."""
_RETRY_SECONDS = 2

Kind = Literal["prediction", "completion"]
Left = Callable[[], Awaitable[bool]]
"""Whether the caller has gone away."""

_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Redis]] = WeakKeyDictionary()


class CompletionQuestion(Document):
    """A completion request whose model and prompt are ids."""

    model: str
    prompt: str | None
    form: CompletionCreate


def alive_key(predictor: str) -> str:
    """The key that one predictor renews."""
    return f"{ALIVE}:{predictor}"


def taken_key(reply: str) -> str:
    """The key that says which predictor has the question."""
    return f"{reply}:taken"


def gone_key(reply: str) -> str:
    """The key that says that nobody waits at ``reply`` any more."""
    return f"{reply}:gone"


async def request(
    payload: dict[str, Any],
    timeout: float | None = None,
    *,
    settings: Settings | None = None,
    kind: Kind = "prediction",
    left: Left | None = None,
) -> dict[str, Any]:
    """Ask the predictors and wait for the whole answer; see :func:`replies`."""
    async with aclosing(replies(payload, timeout, settings=settings, kind=kind, left=left)) as found:
        async for reply in found:
            if "ok" in reply:
                return dict(reply["ok"])
    raise Unavailable("the predictor's answer has no end; try again")


async def replies(
    payload: dict[str, Any],
    timeout: float | None = None,
    *,
    settings: Settings | None = None,
    kind: Kind = "prediction",
    left: Left | None = None,
) -> AsyncGenerator[dict[str, Any]]:
    """Ask the predictors; every ``part`` as it comes, and at last ``ok``.

    ``payload`` is a ``PredictionCreate`` document whose ``model`` and ``prompt`` are ids, or a
    :class:`CompletionQuestion`. Leaving before the end makes the predictor stop.

    Raises:
        Unavailable: no predictor is there, or the one that had the question is gone.
        Timeout: none answered in time.
        TooManyRequests: as many requests as may wait are waiting.
        Cancelled: ``left`` says that the caller is gone.
        PostError: whatever the predictor says, for example :class:`~post_shared.errors.PromptMismatch`.
    """
    known = settings or get_settings()
    seconds = known.prediction_seconds if timeout is None else timeout
    client = _client(known)
    reply = f"post:predictor:answer:{secrets.token_hex(16)}"
    ended = True
    try:
        await _check_room(client, known.predictor_queue)
        question = {"reply": reply, "deadline": time.time() + seconds, "kind": kind, "payload": payload}
        await client.lpush(QUESTIONS, json.dumps(question))
        ended = False
        deadline = time.monotonic() + seconds
        while not ended:
            found = await _next(client, reply, deadline, seconds, left)
            ended = "part" not in found
            if "problem" in found:
                raise from_problem(found["problem"])
            yield found
    except (RedisError, OSError) as error:
        raise Unavailable(f"the predictors can't be reached ({type(error).__name__}); try again") from error
    finally:
        if not ended:
            await _leave(client, reply)


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


async def _check_room(client: Redis, most_waiting: int) -> None:
    async with client.pipeline(transaction=False) as pipe:
        pipe.exists(ALIVE)
        pipe.llen(QUESTIONS)
        found, waiting = await pipe.execute()
    if not found:
        raise Unavailable("no predictor is running; it may be starting: try again in some seconds")
    if waiting >= most_waiting:
        raise TooManyRequests(
            f"{waiting} requests wait for an answer already; come back later", retry_after=_RETRY_SECONDS
        )


async def _next(client: Redis, reply: str, deadline: float, seconds: float, left: Left | None) -> dict[str, Any]:
    while (rest := deadline - time.monotonic()) > 0:
        found = await client.brpop([reply], timeout=min(_LOOK_SECONDS, max(0.05, rest)))
        if found is not None:
            return dict(json.loads(found[1]))
        taken = await client.get(taken_key(reply))
        if not await client.exists(ALIVE if taken is None else alive_key(_text(taken))):
            raise Unavailable("the predictor went away before it answered; try again")
        if left is not None and await left():
            raise Cancelled("the caller went away")
    raise Timeout(f"no answer within {seconds:g} s; ask for less at once, or try again later")


async def _leave(client: Redis, reply: str) -> None:
    """Tell the predictor, also when this very task is being cancelled."""
    with anyio.CancelScope(shield=True):
        try:
            await client.set(gone_key(reply), 1, ex=KEPT_SECONDS)
        except (RedisError, OSError):
            return  # the question's own deadline ends it


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _client(settings: Settings) -> Redis:
    clients = _clients.setdefault(asyncio.get_running_loop(), {})
    if settings.redis_url not in clients:
        clients[settings.redis_url] = Redis.from_url(
            settings.redis_url, socket_connect_timeout=2.0, socket_timeout=_LOOK_SECONDS + 5.0
        )
    return clients[settings.redis_url]


def part(piece: dict[str, Any]) -> str:
    """A piece of an answer as it travels."""
    return json.dumps({"part": piece})


def answer(result: dict[str, Any]) -> str:
    """An answer as it travels."""
    return json.dumps({"ok": result})


def refusal(error: PostError) -> str:
    """An error as it travels."""
    return json.dumps({"problem": error.problem()})
