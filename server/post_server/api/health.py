"""Liveness, readiness and metrics."""

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

_REDIS_SECONDS = 1.0
_CHECK_SECONDS = 3.0
"""How long a part may take to answer: with its host gone, a database client gives up only after half a minute."""


@router.get("/livez")
async def get_liveness() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz", responses={503: {"model": Health, "description": "A part can't be reached"}})
async def get_readiness(app: App, response: Response) -> Health:
    """The database, the blob store and the broker answer within seconds."""
    checks = {"records": _records, "blobs": _blobs, "broker": _broker}
    answers = await asyncio.gather(*(_result(app, name, check) for name, check in checks.items()))
    results = dict(zip(checks, answers, strict=True))
    ready = all(result == "ok" for result in results.values())
    response.status_code = 200 if ready else 503
    return Health(status="ok" if ready else "unavailable", checks=results)


@router.get("/metrics", response_class=Response)
def get_metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _result(app: Context, name: str, check: Callable[[Context], None]) -> str:
    """The result of a check. Concurrent requests share a check that hangs, so that no second thread hangs."""
    running = app.readiness_checks.get(name)
    if running is None or running.done():
        running = app.readiness_checks[name] = asyncio.ensure_future(run_in_threadpool(_run, check, app))
    done, _ = await asyncio.wait([running], timeout=_CHECK_SECONDS)
    return running.result() if done else TimeoutError.__name__


def _run(check: Callable[[Context], None], app: Context) -> str:
    try:
        check(app)
    except Exception as error:  # any error means not ready; callers are anonymous, so they only get the class
        return type(error).__name__
    return "ok"


def _records(app: Context) -> None:
    with app.database.read() as session:
        session.execute(text("SELECT 1 FROM api_keys"))


def _blobs(app: Context) -> None:
    app.store.exists("0" * 64)


def _broker(app: Context) -> None:
    url, seconds = app.settings.redis_url, _REDIS_SECONDS
    with Redis.from_url(url, socket_timeout=seconds, socket_connect_timeout=seconds) as client:
        client.ping()
