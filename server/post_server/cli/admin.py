"""``post admin``: what the provider does now and then. Keys have verbs of their own, ``post key``."""

from __future__ import annotations

from typing import Annotated

import typer

from post_server.cli.context import parts, when
from post_shared.cli.output import AsJson, plain_table, print_json, print_table
from post_shared.schemas.jobs import JobState

admin = typer.Typer(no_args_is_help=True, help="The audit log, jobs and storage.")


@admin.command("audit")
def show_audit(
    who: Annotated[str | None, typer.Option(help="The id of a key, or local:USER.")] = None,
    action: Annotated[str | None, typer.Option(help="Such as prompt.delete, or prompt for all about prompts.")] = None,
    thing: Annotated[str | None, typer.Option(help="The id of a prompt, job, model, dataset or key.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Of so many last days.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="So many lines at most.")] = 100,
    json: AsJson = False,
) -> None:
    """Who did what to which thing, newest first. Nobody can change or remove a line."""
    from post_server.auth.audit_log import lines

    with parts() as (_, database, _), database.read() as session:
        rows = lines(session, who=who, action=action, thing=thing, days=days, limit=limit)
    members = ("who", "action", "thing", "request_id")
    if json:
        print_json([{"at": row.at.isoformat()} | {name: getattr(row, name) for name in members} for row in rows])
        return
    shown = plain_table("at (UTC)", "who", "action", "thing", "request")
    for row in rows:
        shown.add_row(f"{row.at:%Y-%m-%d %H:%M:%S}", *(getattr(row, name) or "" for name in members))
    print_table(shown)


@admin.command("jobs")
def list_jobs(
    state: Annotated[JobState | None, typer.Option(help="Only those in this state.")] = None,
    key: Annotated[str | None, typer.Option(help="Only those of this key, by its id.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="So many at most.")] = 50,
    json: AsJson = False,
) -> None:
    """The jobs of all keys, newest first."""
    from sqlalchemy import select

    from post_server.db.tables import JobRow
    from post_server.jobs.service import job_document

    statement = select(JobRow)
    for column, wanted in ((JobRow.state, state), (JobRow.owner_key_id, key)):
        statement = statement if wanted is None else statement.where(column == wanted)
    with parts() as (_, database, _), database.read() as session:
        rows = session.scalars(statement.order_by(JobRow.created_at.desc(), JobRow.id).limit(limit)).all()
    if json:
        print_json([job_document(row).model_dump(mode="json") for row in rows])
        return
    shown = plain_table("id", "kind", "state", "progress", "priority", "attempt", "lost", "key", "created", "error")
    for row in rows:
        counts = (str(each) for each in (row.priority, row.attempt, row.lease_losses))
        error = str(row.error["code"]) if row.error else ""
        facts = (row.kind.value, row.state.value, f"{row.progress:.0%}", *counts, row.owner_key_id)
        shown.add_row(row.id, *facts, when(row.created_at), error)
    print_table(shown)


Job = Annotated[str, typer.Argument(help="Its id.")]


@admin.command("cancel")
def cancel_job(job: Job) -> None:
    """Stop a job: a queued one ends at once, a running one soon."""
    from post_server.auth.audit_log import local_user, record
    from post_server.jobs.states import request_cancel

    with parts() as (_, database, _), database.write() as session:
        row = request_cancel(session, job)
        record(session, local_user(), "job.cancel", job)
    typer.echo(f"{row.id}: {row.state}")


@admin.command("priority")
def prioritise_job(
    job: Job, priority: Annotated[int, typer.Argument(min=-100, max=100, help="The higher come first.")]
) -> None:
    """Move a waiting job forward or back in the line."""
    from post_server.auth.audit_log import local_user, record
    from post_server.jobs.states import prioritise

    with parts() as (_, database, _), database.write() as session:
        row = prioritise(session, job, priority)
        record(session, local_user(), "job.priority", job)
    typer.echo(f"{row.id}: priority {row.priority}")


@admin.command("requeue")
def requeue_job(job: Job) -> None:
    """Queue a job that failed or was cancelled again, from its beginning."""
    from post_server.auth.audit_log import local_user, record
    from post_server.jobs.notifier import notify
    from post_server.jobs.states import requeue

    with parts() as (settings, database, _):
        with database.write() as session:
            row = requeue(session, job)
            record(session, local_user(), "job.requeue", job)
        notify(row.id, settings, row.device)
    typer.echo(f"{row.id}: {row.state}")


@admin.command("collect-garbage")
def collect_storage(
    grace_hours: Annotated[float, typer.Option(min=0, help="Leave alone what is younger than that.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove what nothing refers to: old blobs, temporary files, cached copies, work folders, expired answers."""
    from datetime import timedelta

    from post_server.auth.audit_log import local_user, record
    from post_server.maintenance.garbage_collection import collect_garbage

    with parts() as (settings, database, store):
        found = collect_garbage(database, store, settings, grace=timedelta(hours=grace_hours), dry_run=dry_run)
        if not dry_run:
            with database.write() as session:
                record(session, local_user(), "storage.collect_garbage", "storage")
    shown = plain_table("would go" if dry_run else "removed", "", "MB")
    for each in found:
        shown.add_row(each.what, f"{each.count:,}", f"{each.size / 1e6:,.1f}")
    print_table(shown)


@admin.command("check")
def check_storage(
    hashes: Annotated[bool, typer.Option("--hashes", help="Read every blob and compare its hash; slow.")] = False,
) -> None:
    """Whether every blob that a row names is there, as after a restore; exit code 1 if not."""
    from post_server.maintenance.garbage_collection import damaged

    with parts() as (_, database, store):
        found = 0
        for line in damaged(database, store, hashes=hashes):
            found += 1
            typer.echo(line)
    typer.echo(f"{found} damaged" if found else "every blob is there", err=True)
    if found:
        raise typer.Exit(1)
