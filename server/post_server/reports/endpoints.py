"""``/v1/reports``: trade-off reports on a student, for the provider. A report is a job and has the job's id."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Path, Response

from post_server.http.dependencies import App, Provider, ProviderReader
from post_server.http.idempotency import IdempotencyKey
from post_server.http.problems import problems
from post_server.http.routing import Route
from post_server.jobs.creation import JOB_PROBLEMS, create_job
from post_server.reports.checks import check_report
from post_server.reports.service import finished_report
from post_shared.schemas.jobs import Job, JobKind
from post_shared.schemas.reports import ReportCreate, TradeOffReport

router = APIRouter(route_class=Route, prefix="/v1/reports", tags=["reports"])


@router.post("", status_code=202, response_model=Job, responses=JOB_PROBLEMS)
def create_report(
    request: ReportCreate,
    app: App,
    caller: Provider,
    tasks: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Compare a student with its target: size, loss, accuracy on public tasks, leakage (provider)."""
    return create_job(app, caller, JobKind.REPORT, request, check_report, idempotency_key, tasks)


@router.get("/{report}", responses=problems(403, 404, 409))
def get_report(
    app: App, caller: ProviderReader, report: Annotated[str, Path(min_length=1, max_length=64)]
) -> TradeOffReport:
    """A finished report (provider)."""
    with app.database.read() as session:
        return finished_report(session, report)
