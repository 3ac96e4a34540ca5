"""Is it alive, is it ready, and in what numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import APIRouter, Request, Response
from redis import Redis
from sqlalchemy import text
from starlette.concurrency import run_in_threadpool

from post_server.http.dependencies import App, Context
from post_server.http.routing import Route
from post_shared.schemas.health import Health

router = APIRouter(route_class=Route, tags=["health"])

_SECONDS = 1.0
_PATIENCE = 3.0
"""How long a part may take to answer: a database whose host is gone would take half a minute to say so."""


@router.get("/livez")
async def get_liveness() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz", responses={503: {"model": Health, "description": "A part can't be reached"}})
async def get_readiness(app: App, response: Response) -> Health:
    """The records, the blobs and the broker can be reached, and answer within seconds."""
    looks = {"records": _records, "blobs": _blobs, "broker": _broker}
    found = await asyncio.gather(*(_answer(app, name, look) for name, look in looks.items()))
    checks = dict(zip(looks, found, strict=True))
    ready = all(each == "ok" for each in checks.values())
    response.status_code = 200 if ready else 503
    return Health(status="ok" if ready else "unavailable", checks=checks)


@router.get("/metrics", response_class=Response)
def get_metrics(request: Request) -> Response:
    """Counts in Prometheus's text form."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _answer(app: Context, name: str, look: Callable[[Context], None]) -> str:
    """What came of a look at a part. One that hangs is waited for by all who ask meanwhile: no second thread hangs."""
    looking = app.looks.get(name)
    if looking is None or looking.done():
        looking = app.looks[name] = asyncio.ensure_future(run_in_threadpool(_check, look, app))
    done, _ = await asyncio.wait([looking], timeout=_PATIENCE)
    return looking.result() if done else TimeoutError.__name__


def _check(look: Callable[[Context], None], app: Context) -> str:
    try:
        look(app)
    except Exception as error:  # whatever it is, the part isn't ready; the class is all that strangers learn
        return type(error).__name__
    return "ok"


def _records(app: Context) -> None:
    with app.database.read() as session:
        session.execute(text("SELECT 1 FROM api_keys"))


def _blobs(app: Context) -> None:
    app.store.exists("0" * 64)


def _broker(app: Context) -> None:
    with Redis.from_url(app.settings.redis_url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS) as client:
        client.ping()
