"""``/v1/distillations``, ``/v1/transfers``, ``/v1/evaluations``: each makes a job. So does ``/v1/reports``."""

from __future__ import annotations

import structlog
from fastapi import APIRouter, BackgroundTasks, Response
from sqlalchemy.orm import Session

from post_server.api.context import App, Context, Mover, Provider
from post_server.api.idempotency import IdempotencyKey, Once, document_hash
from post_server.api.problems import problems
from post_server.api.routes import Route
from post_server.job_orders import Order, job_document, place_order
from post_server.jobs.doorbell import ring
from post_server.records import ApiKeyRow
from post_shared.schemas import DistillationCreate, EvaluationCreate, Job, TransferCreate

log = structlog.get_logger("post.api")
router = APIRouter(route_class=Route, prefix="/v1", tags=["jobs"])

ORDER_PROBLEMS = problems(403, 404, 409, 413, 429)


@router.post("/distillations", status_code=202, response_model=Job, responses=ORDER_PROBLEMS)
def create_distillation(
    order: DistillationCreate,
    app: App,
    caller: Provider,
    tasks: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Distil a target model into a student (provider)."""
    return place(app, caller, order, idempotency_key, tasks)


@router.post("/transfers", status_code=202, response_model=Job, responses=ORDER_PROBLEMS)
def create_transfer(
    order: TransferCreate,
    app: App,
    caller: Mover,
    tasks: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Move a source prompt to the target model."""
    return place(app, caller, order, idempotency_key, tasks)


@router.post("/evaluations", status_code=202, response_model=Job, responses=ORDER_PROBLEMS)
def create_evaluation(
    order: EvaluationCreate,
    app: App,
    caller: Mover,
    tasks: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Measure a model, with or without a prompt, on a labelled public dataset."""
    return place(app, caller, order, idempotency_key, tasks)


def place(
    app: Context, caller: ApiKeyRow, order: Order, idempotency_key: str | None, tasks: BackgroundTasks
) -> Response:
    """Queue an order, once however often it is sent, and ring for it."""
    once = Once(app, caller, idempotency_key)

    def create(session: Session) -> tuple[int, Job]:
        row = place_order(session, caller, order, app.settings)
        log.info("job ordered", job=row.id, kind=row.kind.value)
        tasks.add_task(ring, row.id, app.settings, row.device)
        return 202, job_document(row)

    with once.in_flight():
        return once.run(type(order).__name__, document_hash(order), create)
