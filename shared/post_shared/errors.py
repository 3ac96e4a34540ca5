"""Every error that POST raises deliberately: one class and one stable code, shared by both sides.

    PostError
    ├── InvalidInput               422  an argument can't be used
    │   ├── TaskInvalid            422  template, labels or label words
    │   ├── DataInvalid            422  a row of a data file (names file, line and column)
    │   ├── PromptFileInvalid      422  bytes that aren't a valid prompt file
    │   ├── PromptMismatch         422  a prompt made for another model, or of another width
    │   ├── ModelUnsafe            422  a model folder that POST refuses to load
    │   ├── PrivacyInvalid         422  (ε, δ) or a noise setting that gives no guarantee
    │   ├── LedgerInvalid          422  a privacy ledger that can't be read or written (client side)
    │   └── IdempotencyMismatch    422  an Idempotency-Key reused with another body
    ├── Unauthenticated            401
    │   └── KeyExpired             401  the API key has expired
    ├── Forbidden                  403
    ├── NotFound                   404
    ├── Conflict                   409
    │   ├── BudgetExceeded         409  a run would exceed the cap on the privacy budget (client side)
    │   └── RequestInFlight        409  a request with the same Idempotency-Key is in progress
    ├── PayloadTooLarge            413
    ├── RangeInvalid               416
    ├── TooManyRequests            429
    ├── IntegrityError             500  bytes that don't match their hash
    ├── Unavailable                503  not available now; try again later
    │   └── Timeout                504
    ├── JobFailed                       a job failed (client side)
    │   ├── WorkerLost                  its worker was lost too often
    │   ├── JobKilled                   its process was killed or crashed too often
    │   ├── JobStalled                  it stopped making progress too often
    │   ├── DiskFull                    the worker's disk is too full for it
    │   └── OutOfMemory                 the machine or the device has too little memory for it
    └── Cancelled                       a job or a long computation was cancelled

The server turns an error into RFC 9457 ``application/problem+json`` with :meth:`PostError.problem`;
the client turns the problem back into the same class with :func:`from_problem`.
"""

from __future__ import annotations

from typing import Any, ClassVar

PROBLEM_MEDIA_TYPE = "application/problem+json"


class PostError(Exception):
    """Base class. ``detail`` says what went wrong, where, and what to do about it."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Something went wrong"

    def __init__(self, detail: str, **fields: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fields = fields
        self.request_id: str | None = None

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 members; ``type`` is a URN that contains the stable code."""
        return {
            "type": f"urn:post:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            **self.fields,
        }


class InvalidInput(PostError):
    code, status, title = "invalid_input", 422, "The input can't be used"


class TaskInvalid(InvalidInput):
    code, title = "task_invalid", "The task can't be used"


class DataInvalid(InvalidInput):
    code, title = "data_invalid", "The data can't be read"


class PromptFileInvalid(InvalidInput):
    code, title = "prompt_file_invalid", "Not a valid prompt file"


class PromptMismatch(InvalidInput):
    code, title = "prompt_mismatch", "The prompt doesn't belong to this model"


class ModelUnsafe(InvalidInput):
    code, title = "model_unsafe", "The model can't be loaded safely"


class PrivacyInvalid(InvalidInput):
    code, title = "privacy_invalid", "The privacy parameters give no guarantee"


class LedgerInvalid(InvalidInput):
    code, title = "ledger_invalid", "The privacy ledger can't be used"


class IdempotencyMismatch(InvalidInput):
    code, title = "idempotency_mismatch", "The Idempotency-Key was used with another body"


class Unauthenticated(PostError):
    code, status, title = "unauthenticated", 401, "No valid API key"


class KeyExpired(Unauthenticated):
    code, title = "key_expired", "The API key has expired"


class Forbidden(PostError):
    code, status, title = "forbidden", 403, "This API key may not do that"


class NotFound(PostError):
    code, status, title = "not_found", 404, "There is no such thing"


class Conflict(PostError):
    code, status, title = "conflict", 409, "The request conflicts with what exists"


class BudgetExceeded(Conflict):
    code, title = "budget_exceeded", "The privacy budget doesn't allow it"


class RequestInFlight(Conflict):
    code, title = "request_in_flight", "The same request is being worked on"


class PayloadTooLarge(PostError):
    code, status, title = "payload_too_large", 413, "The body is too large"


class RangeInvalid(PostError):
    code, status, title = "range_invalid", 416, "The range can't be served"


class TooManyRequests(PostError):
    code, status, title = "too_many_requests", 429, "Too many requests"


class IntegrityError(PostError):
    code, status, title = "integrity_error", 500, "The bytes don't match their hash"


class Unavailable(PostError):
    code, status, title = "unavailable", 503, "Not available now"


class Timeout(Unavailable):
    code, status, title = "timeout", 504, "No answer in time"


class JobFailed(PostError):
    code, title = "job_failed", "The job failed"


class WorkerLost(JobFailed):
    code, title = "worker_lost", "The worker was lost"


class JobKilled(JobFailed):
    code, title = "job_killed", "The job's process was killed"


class JobStalled(JobFailed):
    code, title = "job_stalled", "The job made no progress"


class DiskFull(JobFailed):
    code, title = "disk_full", "There is too little room on the worker's disk"


class OutOfMemory(JobFailed):
    code, title = "out_of_memory", "There is too little memory for the job"


class Cancelled(PostError):
    code, status, title = "cancelled", 409, "The work was cancelled"


def _tree(base: type[PostError]) -> dict[str, type[PostError]]:
    by_code = {base.code: base}
    for child in base.__subclasses__():
        by_code |= _tree(child)
    return by_code


def errors() -> list[type[PostError]]:
    """All classes of the tree."""
    return list(_tree(PostError).values())


def from_problem(problem: dict[str, Any]) -> PostError:
    """The error that a problem document describes; for an unknown code, a plain :class:`PostError`."""
    members = dict(problem)
    code = str(members.pop("code", PostError.code))
    detail = str(members.pop("detail", members.get("title", "The server gave no detail")))
    for name in ("type", "title", "status", "instance"):
        members.pop(name, None)
    request_id = members.pop("request_id", None)
    error = _tree(PostError).get(code, PostError)(detail, **members)
    error.request_id = str(request_id) if request_id else None
    return error
