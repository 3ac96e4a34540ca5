"""Where endpoints run: blocking ones in a thread, everything around them in the event loop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from inspect import iscoroutinefunction, signature
from typing import Any

from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from post_server.http.dependencies import authenticate_first

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Route(APIRoute):
    """The route class of every router.

    FastAPI would validate the result of a plain function in a second thread. Our documents are validated when they
    are created, so validating them again takes less time than switching threads.

    A plain GET function with the parameter ``app`` only reads the database, so it runs in the thread pool of
    :meth:`post_server.db.database.Database.run_read`. Endpoints that also wait for blobs or Redis are asynchronous.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if not iscoroutinefunction(endpoint):
            only_reads = options.get("methods") == ["GET"] and "app" in signature(endpoint).parameters
            endpoint = _in_reader_thread(endpoint) if only_reads else _in_thread(endpoint)
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Handler:
        """FastAPI's handler, but it authenticates before it parses the body."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def authenticated(request: Request) -> Response:
            await authenticate_first(request)
            return await handler(request)

        return authenticated


def _in_reader_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(endpoint)
    async def run(**arguments: Any) -> Any:
        return await arguments["app"].database.run_read(endpoint, **arguments)

    return run


def _in_thread(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(endpoint)
    async def run(**arguments: Any) -> Any:
        return await run_in_threadpool(endpoint, **arguments)

    return run
