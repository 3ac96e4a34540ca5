"""``post admin``: the audit log, jobs and storage."""

from __future__ import annotations

from typing import Annotated

import typer

from post_server.cli.context import services, when
from post_shared.cli.output import AsJson, plain_table, print_json, print_table
from post_shared.schemas.jobs import JobState

admin = typer.Typer(no_args_is_help=True, help="The audit log, jobs and storage.")


@admin.command("audit")
def show_audit(
    who: Annotated[str | None, typer.Option(help="The id of a key, or local:USER.")] = None,
    action: Annotated[str | None, typer.Option(help="For example prompt.delete, or prompt for all of them.")] = None,
    thing: Annotated[str | None, typer.Option(help="The id of a prompt, job, model, dataset or key.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Only lines of the last DAYS days.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of lines.")] = 100,
    json: AsJson = False,
) -> None:
    """Who did what to which object, newest first. The log is append-only."""
    from post_server.auth.audit_log import lines

    with services() as (_, database, _), database.read() as session:
        rows = lines(session, who=who, action=action, thing=thing, days=days, limit=limit)
    members = ("who", "action", "thing", "request_id")
    if json:
        print_json([{"at": row.at.isoformat()} | {name: getattr(row, name) for name in members} for row in rows])
        return
    table = plain_table("at (UTC)", "who", "action", "thing", "request")
    for row in rows:
        table.add_row(f"{row.at:%Y-%m-%d %H:%M:%S}", *(getattr(row, name) or "" for name in members))
    print_table(table)


@admin.command("jobs")
def list_jobs(
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    key: Annotated[str | None, typer.Option(help="Only jobs of the key with this id.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of jobs.")] = 50,
    json: AsJson = False,
) -> None:
    """The jobs of all keys, newest first."""
    from sqlalchemy import select

    from post_server.db.tables import JobRow
    from post_server.jobs.service import job_document

    statement = select(JobRow)
    for column, value in ((JobRow.state, state), (JobRow.owner_key_id, key)):
        statement = statement if value is None else statement.where(column == value)
    with services() as (_, database, _), database.read() as session:
        rows = session.scalars(statement.order_by(JobRow.created_at.desc(), JobRow.id).limit(limit)).all()
    if json:
        print_json([job_document(row).model_dump(mode="json") for row in rows])
        return
    table = plain_table("id", "kind", "state", "progress", "priority", "attempt", "lost", "key", "created", "error")
    for row in rows:
        counts = (str(count) for count in (row.priority, row.attempt, row.lease_losses))
        error = str(row.error["code"]) if row.error else ""
        facts = (row.kind.value, row.state.value, f"{row.progress:.0%}", *counts, row.owner_key_id)
        table.add_row(row.id, *facts, when(row.created_at), error)
    print_table(table)


Job = Annotated[str, typer.Argument(help="The job's id.")]


@admin.command("cancel")
def cancel_job(job: Job) -> None:
    """Cancel a job: a queued one at once, a running one soon."""
    from post_server.auth.audit_log import local_user, record
    from post_server.jobs.states import request_cancel

    with services() as (_, database, _), database.write() as session:
        row = request_cancel(session, job)
        record(session, local_user(), "job.cancel", job)
    typer.echo(f"{row.id}: {row.state}")


@admin.command("priority")
def prioritise_job(
    job: Job, priority: Annotated[int, typer.Argument(min=-100, max=100, help="Higher priorities run first.")]
) -> None:
    """Set the priority of a queued job."""
    from post_server.auth.audit_log import local_user, record
    from post_server.jobs.states import prioritise

    with services() as (_, database, _), database.write() as session:
        row = prioritise(session, job, priority)
        record(session, local_user(), "job.priority", job)
    typer.echo(f"{row.id}: priority {row.priority}")


@admin.command("requeue")
def requeue_job(job: Job) -> None:
    """Queue a failed or cancelled job again, from the beginning."""
    from post_server.auth.audit_log import local_user, record
    from post_server.jobs.notifier import notify
    from post_server.jobs.states import requeue

    with services() as (settings, database, _):
        with database.write() as session:
            row = requeue(session, job)
            record(session, local_user(), "job.requeue", job)
        notify(row.id, settings, row.device)
    typer.echo(f"{row.id}: {row.state}")


@admin.command("collect-garbage")
def collect_storage(
    grace_hours: Annotated[float, typer.Option(min=0, help="Keep everything younger than this.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
) -> None:
    """Remove unreferenced blobs, temporary files, cached copies, work folders and expired responses."""
    from datetime import timedelta

    from post_server.auth.audit_log import local_user, record
    from post_server.maintenance.garbage_collection import collect_garbage

    with services() as (settings, database, store):
        garbage = collect_garbage(database, store, settings, grace=timedelta(hours=grace_hours), dry_run=dry_run)
        if not dry_run:
            with database.write() as session:
                record(session, local_user(), "storage.collect_garbage", "storage")
    table = plain_table("would be removed" if dry_run else "removed", "", "MB")
    for item in garbage:
        table.add_row(item.what, f"{item.count:,}", f"{item.size / 1e6:,.1f}")
    print_table(table)


@admin.command("check")
def check_storage(
    hashes: Annotated[bool, typer.Option("--hashes", help="Also read every blob and check its hash; slow.")] = False,
) -> None:
    """Check that all blobs that rows refer to exist, for example after a restore; exit code 1 if not."""
    from post_server.maintenance.garbage_collection import damaged

    with services() as (_, database, store):
        count = 0
        for line in damaged(database, store, hashes=hashes):
            count += 1
            typer.echo(line)
    typer.echo(f"{count} damaged" if count else "every blob exists", err=True)
    if count:
        raise typer.Exit(1)
