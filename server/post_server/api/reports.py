"""``/v1/reports``: what the provider weighs before a student is given away. A report is a job; its id is the job's."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Path, Response

from post_server.api.context import App, Provider, ProviderReader
from post_server.api.idempotency import IdempotencyKey
from post_server.api.orders import ORDER_PROBLEMS, place
from post_server.api.problems import problems
from post_server.api.routes import Route
from post_server.reports import finished_report
from post_shared.report_schemas import ReportCreate, TradeOffReport
from post_shared.schemas import Job

router = APIRouter(route_class=Route, prefix="/v1/reports", tags=["reports"])


@router.post("", status_code=202, response_model=Job, responses=ORDER_PROBLEMS)
def create_report(
    order: ReportCreate,
    app: App,
    caller: Provider,
    tasks: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Compare a student with its target: size, loss, accuracy on public tasks, leakage (provider)."""
    return place(app, caller, order, idempotency_key, tasks)


@router.get("/{report}", responses=problems(403, 404, 409))
def get_report(
    app: App, caller: ProviderReader, report: Annotated[str, Path(min_length=1, max_length=64)]
) -> TradeOffReport:
    """A finished report (provider)."""
    with app.database.read() as session:
        return finished_report(session, report)
