"""``post admin``: what the provider does now and then. Keys have verbs of their own, ``post key``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from post_server.cli.parts import parts, show, table

admin = typer.Typer(no_args_is_help=True, help="The audit log, jobs and storage.")


@admin.command("audit")
def show_audit(
    who: Annotated[str | None, typer.Option(help="The id of a key, or local:USER.")] = None,
    action: Annotated[str | None, typer.Option(help="Such as prompt.delete, or prompt for all about prompts.")] = None,
    thing: Annotated[str | None, typer.Option(help="The id of a prompt, job, model, dataset or key.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Of so many last days.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="So many lines at most.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """Who did what to which thing, newest first. Nobody can change or remove a line."""
    from post_server.audit_log import lines

    with parts() as (_, database, _), database.read() as session:
        rows = lines(session, who=who, action=action, thing=thing, days=days, limit=limit)
    shown = table("at (UTC)", "who", "action", "thing", "request")
    for row in rows:
        cells = {"who": row.who, "action": row.action, "thing": row.thing, "request_id": row.request_id}
        if as_json:
            typer.echo(json.dumps({"at": row.at.isoformat(), **cells}))
        else:
            shown.add_row(f"{row.at:%Y-%m-%d %H:%M:%S}", *(each or "" for each in cells.values()))
    if not as_json:
        show(shown)
