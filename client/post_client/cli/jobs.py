"""``post jobs list | show | watch | cancel``"""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer
from rich.markup import escape

from post_client.console import Url, connect, err, follow, metrics_note, out, print_facts
from post_shared.cli.output import AsJson, plain_table, print_json, print_table
from post_shared.schemas.jobs import Job, JobKind, JobState

jobs = typer.Typer(no_args_is_help=True, help="Jobs at the provider: distillations, transfers, evaluations, reports.")
JobId = Annotated[str, typer.Argument(help="Id of the job.")]


@jobs.command("list")
def list_(
    kind: Annotated[JobKind | None, typer.Option(help="Only jobs of this kind.")] = None,
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of jobs.")] = 50,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """List your jobs, newest first."""
    with connect(url) as client:
        documents = [job.document for job in islice(client.jobs.list(kind=kind, state=state), limit)]
    if json:
        print_json([document.model_dump(mode="json") for document in documents])
        return
    table = plain_table("id", "kind", "state", "progress", "metrics", "created")
    table.columns[0].min_width = 28  # ids must not wrap: they are copied
    for job in documents:
        metrics = escape(metrics_note(job.metrics))
        table.add_row(job.id, job.kind, job.state, f"{job.progress:.0%}", metrics, f"{job.created_at:%Y-%m-%d %H:%M}")
    print_table(table, out)


@jobs.command()
def show(job: JobId, url: Url = None, json: AsJson = False) -> None:
    """Show a job with its result or error."""
    with connect(url) as client:
        _print(client.jobs.get(job).document, json)


@jobs.command()
def watch(job: JobId, url: Url = None, json: AsJson = False) -> None:
    """Wait for a job. On Ctrl-C you can leave it running."""
    with connect(url) as client:
        _print(follow(client.jobs.get(job)).document, json)


@jobs.command()
def cancel(job: JobId, url: Url = None, json: AsJson = False) -> None:
    """Cancel a job."""
    with connect(url) as client:
        current = client.jobs.get(job)
        if current.state.ended:
            err.print(f"The job has already ended: {current.state.value}.")
        _print(current.cancel().document, json)


def _print(document: Job, json: bool) -> None:
    if json:
        print_json(document.model_dump(mode="json"))
        return
    facts = document.model_dump(mode="json", exclude={"error", "metrics", "request"})
    facts["metrics"] = metrics_note(document.metrics) or None
    facts["error"] = document.error.detail if document.error else None
    print_facts(facts)
