"""Shared by the endpoints that create a job: check the request, queue it once, notify the workers."""

from __future__ import annotations

import structlog
from fastapi import BackgroundTasks, Response
from sqlalchemy.orm import Session

from post_server.db.tables import ApiKeyRow
from post_server.http.dependencies import Context
from post_server.http.idempotency import Once, document_hash
from post_server.http.problems import problems
from post_server.jobs.notifier import notify
from post_server.jobs.service import Check, Request, job_document, queue_job
from post_shared.schemas.jobs import Job, JobKind

log = structlog.get_logger("post.api")

JOB_PROBLEMS = problems(403, 404, 409, 413, 429)


def create_job(
    app: Context,
    caller: ApiKeyRow,
    kind: JobKind,
    request: Request,
    check: Check[Request],
    idempotency_key: str | None,
    tasks: BackgroundTasks,
) -> Response:
    """Queue ``request`` as a job, only once even if it is sent again, and notify the workers."""
    once = Once(app, caller, idempotency_key)

    def create(session: Session) -> tuple[int, Job]:
        row = queue_job(session, caller, kind, request, check, app.settings)
        log.info("job queued", job=row.id, kind=row.kind.value)
        tasks.add_task(notify, row.id, app.settings, row.device)
        return 202, job_document(row)

    with once.in_flight():
        return once.run(type(request).__name__, document_hash(request), create)
