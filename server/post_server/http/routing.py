"""How endpoints run: those that wait each in a thread, all around them in the event loop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from inspect import iscoroutinefunction, signature
from typing import Any

from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from post_server.http.dependencies import admit_first

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Route(APIRoute):
    """The route class of every router.

    FastAPI would send the answer of a plain function to a second thread to have it checked. Documents check themselves
    when they are made, so that takes less time than to change threads.

    A plain function that gets something from the ``app`` reads records and nothing else, so it runs in the threads of
    :meth:`post_server.db.database.Database.look`. What also waits for blobs or for Redis is asynchronous and says where.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if not iscoroutinefunction(endpoint):
            reads = options.get("methods") == ["GET"] and "app" in signature(endpoint).parameters
            endpoint = _reading(endpoint) if reads else _in_thread(endpoint)
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Handler:
        """As FastAPI's, but it asks for the key before it reads a document."""
        answer = super().get_route_handler()
        if self.body_field is None:
            return answer

        async def admitted(request: Request) -> Response:
            await admit_first(request)
            return await answer(request)

        return admitted


def _reading(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(endpoint)
    async def run(**arguments: Any) -> Any:
        return await arguments["app"].database.look(endpoint, **arguments)

    return run


def _in_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(endpoint)
    async def run(**arguments: Any) -> Any:
        return await run_in_threadpool(endpoint, **arguments)

    return run
