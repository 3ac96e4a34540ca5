"""Requests to one server, with safe retries, typed errors and typed responses; one code path for sync and async."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import IO, Any, TypeVar

import httpx
from pydantic import BaseModel
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from post_client.http.responses import error_of, parse
from post_client.http.transports import AsyncWire, BlockingWire, Wire
from post_shared.errors import InvalidInput, PostError, RequestInFlight, Timeout, TooManyRequests, Unavailable
from post_shared.schemas.common import Page

T = TypeVar("T", bound=BaseModel)
Content = bytes | Callable[[], IO[bytes]]

USER_AGENT = "post-client"
"""The same on every machine: no version, no platform."""

RETRYABLE = (Unavailable, TooManyRequests, RequestInFlight)
MAX_RETRY_WAIT = 60.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")  # a proxy can't reach a server on this machine
JSON = {"Content-Type": "application/json"}


class Http:
    """One connection pool. ``get`` and ``create`` are retried when the server is unavailable; see :meth:`send`.

    Create one with :func:`blocking_http` or :func:`async_http`.
    """

    def __init__(self, base: httpx.URL, api_key: str, attempts: int, wire: Wire) -> None:
        self.base = str(base).rstrip("/")
        if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
            raise InvalidInput("the API key contains invalid characters; copy it again")
        self._key = api_key
        self._attempts = attempts
        self.wire = wire

    # --- requests -------------------------------------------------------------------------------------

    async def get(self, path: str, document: type[T], **params: Any) -> T:
        """GET one document."""
        return parse(await self.send("GET", path, params=params, idempotent=True), document)

    async def pages(self, path: str, document: type[T], **params: Any) -> AsyncIterator[T]:
        """GET every item of a list, page by page."""
        cursor: str | None = None
        while True:
            page = await self.get(path, Page[document], **params, cursor=cursor)  # type: ignore[valid-type]
            for item in page.items:
                yield item
            cursor = page.next_cursor
            if cursor is None:
                return

    async def create(self, path: str, body: BaseModel, document: type[T]) -> T:
        """POST a document. The idempotency key makes retries safe."""
        content = body.model_dump_json(exclude_none=True).encode()
        headers = JSON | {"Idempotency-Key": str(uuid.uuid4())}
        return parse(await self.send("POST", path, content=content, headers=headers, idempotent=True), document)

    async def send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        content: Content | None = None,
        headers: Mapping[str, str] | None = None,
        idempotent: bool,
    ) -> httpx.Response:
        """The response, its body read, with a status below 400. Only ``idempotent`` requests are sent again."""

        async def once() -> httpx.Response:
            async with self.stream(method, path, params=params, content=content, headers=headers) as response:
                await self.wire.read(response)
                return response

        return await self.with_retries(once, idempotent=idempotent)

    async def with_retries(
        self, request: Callable[[], Awaitable[httpx.Response]], *, idempotent: bool
    ) -> httpx.Response:
        """Run ``request``, with backoff while the server is unavailable or busy. A request that isn't idempotent is
        retried only if the connection was refused: then nothing was sent."""
        policy = AsyncRetrying(
            sleep=self.wire.sleep,
            stop=stop_after_attempt(self._attempts),
            wait=_wait,
            retry=retry_if_exception(lambda e: isinstance(e, RETRYABLE) if idempotent else _refused(e)),
            reraise=True,
        )

        async def attempt() -> httpx.Response:
            return await request()

        return await policy(attempt)

    @asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        content: Content | None = None,
        headers: Mapping[str, str] | None = None,
        read_timeout: float | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """The response, its body not yet read; errors are raised as classes of :mod:`post_shared.errors`.

        ``read_timeout`` is the longest wait for the next bytes, in seconds.
        """
        file = content() if callable(content) else None
        body = content if file is None else self.wire.body(file)
        request = self._request(method, path, params or {}, body, headers or {}, read_timeout)
        try:
            response = await self.wire.send(request)
            try:
                if response.status_code >= 400:
                    await self.wire.read(response)
                    raise error_of(response)
                yield response
            finally:
                await self.wire.finish(response)
        except httpx.TransportError as error:
            raise self._transport_error(error) from error
        finally:
            if file is not None:
                file.close()

    def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any],
        body: Any,
        headers: Mapping[str, str],
        read_timeout: float | None,
    ) -> httpx.Request:
        query = {name: value for name, value in params.items() if value is not None}
        all_headers = {"Accept": "application/json", "User-Agent": USER_AGENT} | dict(headers)
        timeout = self.wire.timeout.as_dict()
        return httpx.Request(
            method,
            self.base + path,
            params=query or None,
            headers=all_headers | {"Authorization": f"Bearer {self._key}"},
            content=body,
            extensions={"timeout": timeout if read_timeout is None else timeout | {"read": read_timeout}},
        )

    def _transport_error(self, error: httpx.TransportError) -> PostError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return Unavailable(
                f"can't connect to {self.base} ({error}). Is the server running (post serve), and is the address "
                "right (--url or POST_URL)?"
            )
        if isinstance(error, httpx.TimeoutException):
            return Timeout(f"{self.base} didn't respond in time; try again, or give the client a longer timeout")
        return Unavailable(f"the connection to {self.base} broke: {error}; try again")


def blocking_http(
    url: str, api_key: str, *, timeout: float, attempts: int, transport: httpx.BaseTransport | None = None
) -> Http:
    """A blocking session, for :func:`post_client.http.transports.run`."""
    base = _address(url)
    wire = BlockingWire(_timeouts(timeout), base.host not in _LOOPBACK, transport)
    return Http(base, api_key, attempts, wire)


def async_http(
    url: str, api_key: str, *, timeout: float, attempts: int, transport: httpx.AsyncBaseTransport | None = None
) -> Http:
    """An asynchronous session, for asyncio or any other loop that anyio supports."""
    base = _address(url)
    wire = AsyncWire(_timeouts(timeout), base.host not in _LOOPBACK, transport)
    return Http(base, api_key, attempts, wire)


def _timeouts(timeout: float) -> httpx.Timeout:
    return httpx.Timeout(timeout, connect=min(10.0, timeout))


def _address(url: str) -> httpx.URL:
    """Parse a server's address; ``http://`` is the default scheme.

    Raises:
        InvalidInput: it isn't one.
    """
    try:
        parts = httpx.URL(url if "://" in url else f"http://{url}")
        surplus = parts.query or parts.fragment or parts.userinfo
        if parts.scheme in ("http", "https") and re.fullmatch(rb"[\w.:-]+", parts.raw_host) and not surplus:
            return parts
    except httpx.InvalidURL:
        pass
    raise InvalidInput(f"{url!r} isn't a server address; one looks like https://provider.example")


def _refused(error: BaseException) -> bool:
    return isinstance(error, Unavailable) and isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout)


_backoff = wait_exponential(multiplier=0.25, max=5.0) + wait_random(0, 0.25)


def _wait(state: RetryCallState) -> float:
    """The server's ``Retry-After`` (seconds), or exponential backoff."""
    error = state.outcome.exception() if state.outcome else None
    retry_after = error.fields.get("retry_after") if isinstance(error, PostError) else None
    return min(float(retry_after), MAX_RETRY_WAIT) if retry_after is not None else _backoff(state)
