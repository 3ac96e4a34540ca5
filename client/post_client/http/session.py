"""Requests to one server: retries where they are safe, typed errors, typed answers. Written once, for both wires."""

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

WORTH_REPEATING = (Unavailable, TooManyRequests, RequestInFlight)
LONGEST_WAIT = 60.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")  # a proxy can't reach this machine's own server
JSON = {"Content-Type": "application/json"}


class Http:
    """One connection pool. ``get`` and ``create`` are repeated when the server is away; see :meth:`send`.

    Make one with :func:`blocking_http` or :func:`async_http`.
    """

    def __init__(self, base: httpx.URL, api_key: str, attempts: int, wire: Wire) -> None:
        self.base = str(base).rstrip("/")
        if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
            raise InvalidInput("the API key holds characters that no key has; copy it again")
        self._key = api_key
        self._attempts = attempts
        self.wire = wire

    # --- verbs ----------------------------------------------------------------------------------------

    async def get(self, path: str, document: type[T], **params: Any) -> T:
        """GET one document."""
        return parse(await self.send("GET", path, params=params, repeat=True), document)

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
        """POST a document. The key makes a repeated request the same request."""
        content = body.model_dump_json(exclude_none=True).encode()
        headers = JSON | {"Idempotency-Key": str(uuid.uuid4())}
        return parse(await self.send("POST", path, content=content, headers=headers, repeat=True), document)

    async def send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        content: Content | None = None,
        headers: Mapping[str, str] | None = None,
        repeat: bool,
    ) -> httpx.Response:
        """One answer with status below 400. ``repeat`` says that sending the same again does no harm."""

        async def once() -> httpx.Response:
            async with self.stream(method, path, params=params, content=content, headers=headers) as answer:
                await self.wire.read(answer)
                return answer

        return await self.repeating(once, repeat=repeat)

    async def repeating(self, work: Callable[[], Awaitable[httpx.Response]], *, repeat: bool) -> httpx.Response:
        """``work``, again after a wait when the server is away or busy. A refused connection was never a request."""
        policy = AsyncRetrying(
            sleep=self.wire.sleep,
            stop=stop_after_attempt(self._attempts),
            wait=_wait,
            retry=retry_if_exception(lambda e: isinstance(e, WORTH_REPEATING) if repeat else _refused(e)),
            reraise=True,
        )

        async def attempt() -> httpx.Response:
            return await work()

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
        patience: float | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """One answer, its body not yet read; errors are raised as classes of :mod:`post_shared.errors`.

        ``patience`` is how long the server may be silent, in seconds.
        """
        file = content() if callable(content) else None
        body = content if file is None else self.wire.body(file)
        request = self._request(method, path, params or {}, body, headers or {}, patience)
        try:
            answer = await self.wire.send(request)
            try:
                if answer.status_code >= 400:
                    await self.wire.read(answer)
                    raise error_of(answer)
                yield answer
            finally:
                await self.wire.finish(answer)
        except httpx.TransportError as error:
            raise self._away(error) from error
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
        patience: float | None,
    ) -> httpx.Request:
        known = {name: value for name, value in params.items() if value is not None}
        given = {"Accept": "application/json", "User-Agent": USER_AGENT} | dict(headers)
        timeout = self.wire.timeout.as_dict()
        return httpx.Request(
            method,
            self.base + path,
            params=known or None,
            headers=given | {"Authorization": f"Bearer {self._key}"},
            content=body,
            extensions={"timeout": timeout if patience is None else timeout | {"read": patience}},
        )

    def _away(self, error: httpx.TransportError) -> PostError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return Unavailable(
                f"nothing answers at {self.base} ({error}). Is the server running (post serve), and is the address "
                "right (--url or POST_URL)?"
            )
        if isinstance(error, httpx.TimeoutException):
            return Timeout(f"{self.base} didn't answer in time; try again, or give the client a longer timeout")
        return Unavailable(f"the connection to {self.base} broke: {error}; try again")


def blocking_http(
    url: str, api_key: str, *, timeout: float, attempts: int, transport: httpx.BaseTransport | None = None
) -> Http:
    """For :func:`post_client.http.transports.run`."""
    base = _address(url)
    wire = BlockingWire(_patience(timeout), base.host not in _LOOPBACK, transport)
    return Http(base, api_key, attempts, wire)


def async_http(
    url: str, api_key: str, *, timeout: float, attempts: int, transport: httpx.AsyncBaseTransport | None = None
) -> Http:
    """For asyncio (and whatever else anyio knows)."""
    base = _address(url)
    wire = AsyncWire(_patience(timeout), base.host not in _LOOPBACK, transport)
    return Http(base, api_key, attempts, wire)


def _patience(timeout: float) -> httpx.Timeout:
    return httpx.Timeout(timeout, connect=min(10.0, timeout))


def _address(url: str) -> httpx.URL:
    """The address, if it is one of a server.

    Raises:
        InvalidInput: it isn't.
    """
    try:
        parts = httpx.URL(url if "://" in url else f"http://{url}")
        surplus = parts.query or parts.fragment or parts.userinfo
        if parts.scheme in ("http", "https") and re.fullmatch(rb"[\w.:-]+", parts.raw_host) and not surplus:
            return parts
    except httpx.InvalidURL:
        pass
    raise InvalidInput(f"{url!r} is no server address; it looks like https://provider.example")


def _refused(error: BaseException) -> bool:
    return isinstance(error, Unavailable) and isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout)


_backoff = wait_exponential(multiplier=0.25, max=5.0) + wait_random(0, 0.25)


def _wait(state: RetryCallState) -> float:
    """As long as the server asks for (``Retry-After``), or longer after each failure."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.fields.get("retry_after") if isinstance(error, PostError) else None
    return min(float(asked), LONGEST_WAIT) if asked is not None else _backoff(state)
