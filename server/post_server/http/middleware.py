"""Around every request: its id, its log line, its metrics, safe headers, and a limit on its body."""

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
from post_server.logs import where
from post_server.storage.outages import is_away
from post_shared.errors import PayloadTooLarge

log = structlog.get_logger("post.api")

_GOOD_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")
_LEFT = 499
"""What logs and metrics say of a request whose caller went away before it was whole; widely used for that."""
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
    """Gives a request its id, logs one line for it, counts it, and turns a defect into a problem.

    The log never holds a query, a header or a body: any of them may be private.
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

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, send_marked)
        except ClientDisconnect:  # in the middle of its body: nobody's defect, and nobody reads an answer
            status = status or _LEFT
        except Exception as error:
            away = is_away(error)
            log.error("store away" if away else "defect", error=type(error).__name__, where=where(error))
            if status:  # too late for another answer: cut the connection, so that nobody takes half for all
                raise ConnectionAbortedError(f"answer {request_id} was cut off") from None
            await failed(request_id, away=away)(scope, receive, send_marked)
        finally:
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
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
    """Counts a body while it arrives and refuses it once it is larger than its path allows.

    The connection stays open and the server throws the rest away: closing it could lose the answer, and the
    caller would never learn why.
    """

    def __init__(self, app: ASGIApp, default: int, paths: dict[str, int]) -> None:
        """``paths`` are patterns of paths with a limit of their own."""
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
    """The caller's own id when it is a harmless one, a fresh one otherwise."""
    given = headers.get("x-request-id", "")
    return given if _GOOD_ID.fullmatch(given) else secrets.token_hex(12)
