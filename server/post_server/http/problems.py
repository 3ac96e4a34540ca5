"""Every error is sent as RFC 9457 ``application/problem+json`` with a stable code and the request id."""

from __future__ import annotations

import errno
import json
import math
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from post_server.logs import error_location
from post_shared.errors import (
    PROBLEM_MEDIA_TYPE,
    Conflict,
    Forbidden,
    InvalidInput,
    NotFound,
    PayloadTooLarge,
    PostError,
    RangeInvalid,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
    errors,
)
from post_shared.schemas.common import Problem
from post_shared.schemas.validation import validation_errors

log = structlog.get_logger("post.api")

_BY_STATUS: dict[int, type[PostError]] = {
    error.status: error
    for error in (
        Unauthenticated,
        Forbidden,
        NotFound,
        Conflict,
        PayloadTooLarge,
        RangeInvalid,
        InvalidInput,
        TooManyRequests,
        Unavailable,
    )
}
CLIENT_SIDE = {"budget_exceeded", "cancelled", "job_failed", "ledger_invalid", "privacy_invalid"}
"""Codes that the API never returns."""
OPENAI_PATH = "/v1/completions"
_HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": "Bearer"},
    409: {"Retry-After": "1"},
    429: {"Retry-After": "10"},
    503: {"Retry-After": "2"},
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of an endpoint, for its OpenAPI document; four are always possible."""
    always = {401, 403, 422, 429}
    return {
        status: {"model": Problem, "description": HTTPStatus(status).phrase} for status in sorted(always | {*statuses})
    }


def describe_problem(status: int) -> dict[str, Any]:
    """The schema of an error with that status: a problem with one of its possible codes."""
    codes = sorted(error.code for error in errors() if error.status == status and error.code not in CLIENT_SIDE)
    members = {"status": {"const": status}, "code": {"enum": codes}}
    return {"allOf": [{"$ref": "#/components/schemas/Problem"}, {"type": "object", "properties": members}]}


def respond(error: PostError, request_id: str | None, headers: dict[str, str] | None = None) -> Response:
    """The problem document of an error; its ``retry_after``, if any, is also sent as a header."""
    defaults = _HEADERS.get(error.status, {})
    if "retry_after" in error.fields:
        defaults = defaults | {"Retry-After": str(math.ceil(error.fields["retry_after"]))}
    return _render(error.problem(), request_id, defaults | (headers or {}))


def _render(problem: dict[str, Any], request_id: str | None, headers: dict[str, str]) -> Response:
    """As ASCII, so that any detail can be sent."""
    document = problem | ({"request_id": request_id} if request_id else {})
    content = json.dumps(document, default=str)
    return Response(content, status_code=problem["status"], media_type=PROBLEM_MEDIA_TYPE, headers=headers)


def install(app: FastAPI) -> None:
    """Make the app send every error as a problem document."""
    app.add_exception_handler(PostError, _post_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OperationalError, _database_unreachable)
    app.add_exception_handler(PoolTimeout, _database_unreachable)
    app.add_exception_handler(DataError, _database_rejects)
    app.add_exception_handler(OSError, _disk_full)


def failed(request_id: str | None, *, away: bool) -> Response:
    """The response to an outage of the blob store or to a defect. It names the log entry and no details."""
    if away:
        return respond(Unavailable("The file storage can't be reached right now; try again."), request_id)
    detail = f"Internal server error; the log has the details under request {request_id}."
    return respond(PostError(detail), request_id)


def _request_id(request: Request) -> str | None:
    return getattr(request.state, "request_id", None)


async def _post_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PostError)
    if error.status >= 500:
        log.error("failed", code=error.code, detail=error.detail)
    headers = {}
    if isinstance(error, RangeInvalid) and "size" in error.fields:
        headers["Content-Range"] = f"bytes */{error.fields['size']}"
    return respond(_with_openai_message(error, request), _request_id(request), headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    """Tell where and what the error is, never what was sent."""
    assert isinstance(error, RequestValidationError)
    mistakes = validation_errors(error.errors()[:20])
    entries = [{"where": where[:200], "message": message[:500]} for where, message in mistakes]
    detail = "; ".join(f"{entry['where']}: {entry['message']}" for entry in entries[:3])
    return respond(_with_openai_message(InvalidInput(detail, validation_errors=entries), request), _request_id(request))


def _with_openai_message(error: PostError, request: Request) -> PostError:
    """OpenAI's clients show the member ``message`` of an error."""
    if request.url.path == OPENAI_PATH:
        error.fields["message"] = error.detail
    return error


async def _http_error(request: Request, error: Exception) -> Response:
    """Errors of the framework: unknown path, wrong method, unparsable body."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, PostError):
        return await _post_error(request, error.__cause__)
    if error.status_code == 400:
        return respond(InvalidInput("The body can't be parsed; send a JSON document."), _request_id(request))
    phrase, headers = HTTPStatus(error.status_code).phrase, dict(error.headers or {})
    if error.status_code in _BY_STATUS:
        problem = _BY_STATUS[error.status_code](str(error.detail)).problem()
    else:
        problem = PostError(str(error.detail)).problem()
        code = phrase.lower().replace(" ", "_")
        problem |= {"title": phrase, "status": error.status_code, "code": code, "type": f"urn:post:error:{code}"}
    if error.status_code == 404 and error.detail == phrase:
        problem["detail"] = f"There is nothing at {request.url.path[:200]}."
    if error.status_code == 405:
        headers["Allow"] = _allowed(request) or headers.get("Allow", "")
        problem["detail"] = f"{request.method} is not allowed here, only {headers['Allow']}."
    return _render(problem, _request_id(request), headers)


def _allowed(request: Request) -> str:
    """All methods of the path; the framework lists only those of the first matching endpoint."""
    methods = {
        method.upper()
        for path, operations in request.app.openapi()["paths"].items()
        if compile_path(path)[0].fullmatch(request.url.path)
        for method in (*operations, *_head_if_download(operations))
    }
    return ", ".join(sorted(methods))


def _head_if_download(operations: dict[str, Any]) -> list[str]:
    """Downloads also support HEAD; see :mod:`post_server.http.range_requests`."""
    return ["head"] if "206" in operations.get("get", {}).get("responses", {}) else []


async def _database_unreachable(request: Request, error: Exception) -> Response:
    log.error("database", error=type(error).__name__, where=error_location(error))
    return respond(Unavailable("The database can't be reached right now; try again."), _request_id(request))


async def _database_rejects(request: Request, error: Exception) -> Response:
    log.warning("database refuses a value", error=type(error).__name__)
    return respond(InvalidInput("A value contains characters or digits that can't be stored."), _request_id(request))


async def _disk_full(request: Request, error: Exception) -> Response:
    """A full disk is neither a defect nor the caller's fault; any other system error is a defect."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise error
    log.error("no room", where=error_location(error))
    return respond(Unavailable("The server's disk is full; tell the provider."), _request_id(request))
