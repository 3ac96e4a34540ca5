"""Answers of a server, read: the document in one, or the error that it describes."""

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
"""What an answer means that is no problem document, as a proxy's."""


def parse(answer: httpx.Response, document: type[T]) -> T:
    """The document in an answer. Members that this version doesn't know yet are left out.

    Raises:
        IntegrityError: it is something else.
    """
    try:
        return document.model_validate_json(answer.content, extra="ignore")
    except ValidationError as error:
        raise IntegrityError(
            f"{answer.request.url.copy_with(query=None)} answered with something that is no {document.__name__} "
            f"({first_error(error.errors())}); is it a POST server, of this version?"
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


def _seconds(given: Any) -> float | None:
    """A waiting time that a server asks for, if it is one."""
    try:
        seconds = float(given)
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
