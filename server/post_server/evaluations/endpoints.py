"""``POST /v1/evaluations``"""

from __future__ import annotations

from fastapi import APIRouter, BackgroundTasks, Response

from post_server.evaluations.checks import check_evaluation
from post_server.http.dependencies import App, TransferCaller
from post_server.http.idempotency import IdempotencyKey
from post_server.http.routing import Route
from post_server.jobs.creation import JOB_PROBLEMS, create_job
from post_shared.schemas.evaluations import EvaluationCreate
from post_shared.schemas.jobs import Job, JobKind

router = APIRouter(route_class=Route, prefix="/v1/evaluations", tags=["jobs"])


@router.post("", status_code=202, response_model=Job, responses=JOB_PROBLEMS)
def create_evaluation(
    request: EvaluationCreate,
    app: App,
    caller: TransferCaller,
    tasks: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Evaluate a model, with or without a prompt, on a labelled public dataset."""
    return create_job(app, caller, JobKind.EVALUATE, request, check_evaluation, idempotency_key, tasks)
