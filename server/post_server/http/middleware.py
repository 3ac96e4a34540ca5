"""Middleware of every request: request id, log line, metrics, security headers and a body limit."""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from post_server.http.metrics import Metrics
from post_server.http.problems import failed, respond
from post_server.logs import error_location
from post_server.storage.outages import is_unreachable
from post_shared.errors import PayloadTooLarge

log = structlog.get_logger("post.api")

_VALID_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
_CLIENT_CLOSED = 499
"""The usual status, in logs and metrics, of a request whose client disconnected before it was complete."""
_QUIET = {"/livez", "/readyz", "/metrics"}
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class RequestMiddleware:
    """Gives each request an id, logs it, counts it and turns an unexpected error into a problem document.

    The log never contains a query, a header or a body: any of them may be private.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:  # within the body: no defect, and nobody reads a response
            status = status or _CLIENT_CLOSED
        except Exception as error:
            away = is_unreachable(error)
            log.error("store away" if away else "defect", error=type(error).__name__, where=error_location(error))
            if status:  # too late for another response: abort, so that a partial one isn't taken for complete
                raise ConnectionAbortedError(f"the response to {request_id} was cut off") from None
            await failed(request_id, away=away)(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self.metrics.observe(scope["method"], route, status, seconds)
        fields: dict[str, Any] = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "milliseconds": round(seconds * 1000, 1),
            "key": scope["state"].get("caller"),
        }
        (log.debug if scope["path"] in _QUIET else log.info)("request", **fields)


class BodyLimitMiddleware:
    """Counts a body while it arrives and refuses it once it exceeds the limit of its path.

    The connection stays open and the server discards the rest: closing it could lose the response, and the
    caller would never learn the reason.
    """

    def __init__(self, app: ASGIApp, default: int, paths: dict[str, int]) -> None:
        """``paths`` maps patterns of paths to their own limits."""
        self.app = app
        self.default = default
        self.paths = [(re.compile(pattern), limit) for pattern, limit in paths.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        limit = next((limit for pattern, limit in self.paths if pattern.fullmatch(path)), self.default)
        error = PayloadTooLarge(f"The body is larger than {limit} bytes.", limit=limit)
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            await respond(error, scope["state"]["request_id"])(scope, receive, send)
            return
        seen = 0

        async def receive_counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > limit:
                    raise error
            return message

        await self.app(scope, receive_counted, send)


def _request_id(headers: Headers) -> str:
    """The caller's own id if it is well-formed, else a new one."""
    sent = headers.get("x-request-id", "")
    return sent if _VALID_ID.fullmatch(sent) else secrets.token_hex(12)
