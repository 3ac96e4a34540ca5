"""``POST /v1/transfers``"""

from __future__ import annotations

from fastapi import APIRouter, BackgroundTasks, Response

from post_server.http.dependencies import App, TransferCaller
from post_server.http.idempotency import IdempotencyKey
from post_server.http.routing import Route
from post_server.jobs.creation import JOB_PROBLEMS, create_job
from post_server.transfers.checks import check_transfer
from post_shared.schemas.jobs import Job, JobKind
from post_shared.schemas.transfers import TransferCreate

router = APIRouter(route_class=Route, prefix="/v1/transfers", tags=["jobs"])


@router.post("", status_code=202, response_model=Job, responses=JOB_PROBLEMS)
def create_transfer(
    request: TransferCreate,
    app: App,
    caller: TransferCaller,
    tasks: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Transfer a source prompt to the target model."""
    return create_job(app, caller, JobKind.TRANSFER, request, check_transfer, idempotency_key, tasks)
