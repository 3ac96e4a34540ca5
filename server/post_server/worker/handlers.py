"""The handler of each kind of job: it loads the inputs, calls the paper's function and returns the outcome."""

from __future__ import annotations

from collections.abc import Callable

from post_server.distillations.job import run_distil
from post_server.evaluations.job import run_evaluate
from post_server.jobs.context import JobContext, Outcome
from post_server.reports.job import run_report
from post_server.transfers.job import run_transfer
from post_shared.schemas.jobs import JobKind

HANDLERS: dict[JobKind, Callable[[JobContext], Outcome]] = {
    JobKind.DISTIL: run_distil,
    JobKind.TRANSFER: run_transfer,
    JobKind.EVALUATE: run_evaluate,
    JobKind.REPORT: run_report,
}
