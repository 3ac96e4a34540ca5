"""Parse a server's responses: the document, or the error that it describes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

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
    Timeout,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    from_problem,
)
from post_shared.schemas.validation import first_error

T = TypeVar("T", bound=BaseModel)

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
"""The error for a response without a problem document, such as a proxy's."""


def parse(response: httpx.Response, document: type[T]) -> T:
    """The document in a response. Members that this version doesn't know are ignored.

    Raises:
        IntegrityError: the response is something else.
    """
    try:
        return document.model_validate_json(response.content, extra="ignore")
    except ValidationError as error:
        raise IntegrityError(
            f"{response.request.url.copy_with(query=None)} did not respond with a {document.__name__} "
            f"({first_error(error.errors())}); is it a POST server of this version?"
        ) from error


def error_of(response: httpx.Response) -> PostError:
    """The error that a response describes."""
    error: PostError | None = None
    if response.headers.get("content-type", "").startswith(PROBLEM_MEDIA_TYPE):
        try:
            members = response.json()
            error = from_problem(members) if isinstance(members, dict) else None
        except (ValueError, TypeError):
            error = None
    if error is None:
        kind = BY_STATUS.get(response.status_code, PostError)
        error = kind(f"the server responded with {response.status_code} {response.reason_phrase}")
    error.request_id = error.request_id or response.headers.get("x-request-id")
    error.fields["retry_after"] = _seconds(error.fields.get("retry_after", response.headers.get("retry-after")))
    return error


def _seconds(value: Any) -> float | None:
    """The server's ``Retry-After`` in seconds; None if it isn't a number."""
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
