"""Requests to one server: retries where they are safe, typed errors, typed answers."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from post_shared.errors import (
    PROBLEM_MEDIA_TYPE,
    Conflict,
    Forbidden,
    IntegrityError,
    InvalidInput,
    NotFound,
    PayloadTooLarge,
    PostError,
    RangeInvalid,
    RequestInFlight,
    Timeout,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    from_problem,
)
from post_shared.schemas import Page

T = TypeVar("T", bound=BaseModel)
Content = bytes | Callable[[], IO[bytes]]

USER_AGENT = "post-client"
"""The same on every machine: no version, no platform."""

BY_STATUS: Mapping[int, type[PostError]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: PayloadTooLarge,
    416: RangeInvalid,
    422: InvalidInput,
    429: TooManyRequests,
    502: Unavailable,
    503: Unavailable,
    504: Timeout,
}
"""What an answer means that is no problem document, as a proxy's."""

WORTH_REPEATING = (Unavailable, TooManyRequests, RequestInFlight)
LONGEST_WAIT = 60.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Http:
    """One connection pool. ``get`` and ``create`` are repeated when the server is away; see :meth:`send`."""

    def __init__(
        self, url: str, api_key: str, *, timeout: float, attempts: int, transport: httpx.BaseTransport | None = None
    ) -> None:
        parts = _address(url)
        self.base = str(parts).rstrip("/")
        if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
            raise InvalidInput("the API key holds characters that no key has; copy it again")
        self._key = api_key
        self._attempts = attempts
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(10.0, timeout)),
            trust_env=parts.host not in _LOOPBACK,  # a proxy can't reach this machine's own server
            transport=transport,
        )

    def close(self) -> None:
        self._client.close()

    # --- verbs ----------------------------------------------------------------------------------------

    def get(self, path: str, document: type[T], **params: Any) -> T:
        """GET one document."""
        return parse(self.send("GET", path, params=params, repeat=True), document)

    def pages(self, path: str, document: type[T], **params: Any) -> Iterator[T]:
        """GET every item of a list, page by page."""
        cursor: str | None = None
        while True:
            page = self.get(path, Page[document], **params, cursor=cursor)  # type: ignore[valid-type]
            yield from page.items
            cursor = page.next_cursor
            if cursor is None:
                return

    def create(self, path: str, body: BaseModel, document: type[T]) -> T:
        """POST a document. The key makes a repeated request the same request."""
        answer = self.send(
            "POST",
            path,
            content=body.model_dump_json(exclude_none=True).encode(),
            headers={"Content-Type": "application/json", "Idempotency-Key": str(uuid.uuid4())},
            repeat=True,
        )
        return parse(answer, document)

    def send(
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

        def once() -> httpx.Response:
            with self.stream(method, path, params=params, content=content, headers=headers) as answer:
                answer.read()
                return answer

        return self.repeating(once, repeat=repeat)

    def repeating(self, work: Callable[[], httpx.Response], *, repeat: bool) -> httpx.Response:
        """``work``, again after a wait when the server is away or busy. A refused connection was never a request."""
        policy = Retrying(
            stop=stop_after_attempt(self._attempts),
            wait=_wait,
            retry=retry_if_exception(lambda e: isinstance(e, WORTH_REPEATING) if repeat else _refused(e)),
            reraise=True,
        )
        return policy(work)

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        content: Content | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[httpx.Response]:
        """One answer, its body not yet read; errors are raised as classes of :mod:`post_shared.errors`."""
        known = {name: value for name, value in (params or {}).items() if value is not None}
        body = content() if callable(content) else content
        given = {"Accept": "application/json", "User-Agent": USER_AGENT} | dict(headers or {})
        request = httpx.Request(
            method,
            self.base + path,
            params=known or None,
            headers=given | {"Authorization": f"Bearer {self._key}"},
            content=body,
            extensions={"timeout": self._client.timeout.as_dict()},
        )
        try:
            answer = self._client.send(request, stream=True)
            try:
                if answer.status_code >= 400:
                    answer.read()
                    raise error_of(answer)
                yield answer
            finally:
                answer.close()
        except httpx.TransportError as error:
            raise self._away(error) from error
        finally:
            if body is not None and not isinstance(body, bytes):
                body.close()

    def _away(self, error: httpx.TransportError) -> PostError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return Unavailable(
                f"nothing answers at {self.base} ({error}). Is the server running (post serve), and is the address "
                "right (--url or POST_URL)?"
            )
        if isinstance(error, httpx.TimeoutException):
            return Timeout(f"{self.base} didn't answer in time; try again, or give the client a longer timeout")
        return Unavailable(f"the connection to {self.base} broke: {error}; try again")


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


def parse(answer: httpx.Response, document: type[T]) -> T:
    """The document in an answer. Members that this version doesn't know yet are left out.

    Raises:
        IntegrityError: it is something else.
    """
    try:
        return document.model_validate_json(answer.content, extra="ignore")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(
            f"{answer.request.url.copy_with(query=None)} answered with something that is no {document.__name__} "
            f"({where}: {first['msg']}); is it a POST server, of this version?"
        ) from error


def error_of(answer: httpx.Response) -> PostError:
    """The error that an answer describes."""
    error: PostError | None = None
    if answer.headers.get("content-type", "").startswith(PROBLEM_MEDIA_TYPE):
        try:
            members = answer.json()
            error = from_problem(members) if isinstance(members, dict) else None
        except (ValueError, TypeError):
            error = None
    if error is None:
        kind = BY_STATUS.get(answer.status_code, PostError)
        error = kind(f"the server answered {answer.status_code} {answer.reason_phrase}")
    error.request_id = error.request_id or answer.headers.get("x-request-id")
    error.fields["retry_after"] = _seconds(error.fields.get("retry_after", answer.headers.get("retry-after")))
    return error


def _refused(error: BaseException) -> bool:
    return isinstance(error, Unavailable) and isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout)


def _seconds(given: Any) -> float | None:
    """A waiting time that a server asks for, if it is one."""
    try:
        seconds = float(given)
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


_backoff = wait_exponential(multiplier=0.25, max=5.0) + wait_random(0, 0.25)


def _wait(state: RetryCallState) -> float:
    """As long as the server asks for (``Retry-After``), or longer after each failure."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.fields.get("retry_after") if isinstance(error, PostError) else None
    return min(float(asked), LONGEST_WAIT) if asked is not None else _backoff(state)
