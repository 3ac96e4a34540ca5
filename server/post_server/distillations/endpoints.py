"""``POST /v1/distillations``"""

from __future__ import annotations

from fastapi import APIRouter, BackgroundTasks, Response

from post_server.distillations.checks import check_distillation
from post_server.http.dependencies import App, Provider
from post_server.http.idempotency import IdempotencyKey
from post_server.http.routing import Route
from post_server.jobs.creation import JOB_PROBLEMS, create_job
from post_shared.schemas.distillations import DistillationCreate
from post_shared.schemas.jobs import Job, JobKind

router = APIRouter(route_class=Route, prefix="/v1/distillations", tags=["jobs"])


@router.post("", status_code=202, response_model=Job, responses=JOB_PROBLEMS)
def create_distillation(
    request: DistillationCreate,
    app: App,
    caller: Provider,
    tasks: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Distil a target model into a student (provider)."""
    return create_job(app, caller, JobKind.DISTIL, request, check_distillation, idempotency_key, tasks)
