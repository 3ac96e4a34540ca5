"""``post key``: API keys with their scopes, limits and expiry."""

from __future__ import annotations

from typing import Annotated

import typer

from post_server.cli.context import services, when
from post_shared.cli.output import AsJson, plain_table, print_json, print_table
from post_shared.errors import InvalidInput
from post_shared.schemas.common import Role
from post_shared.schemas.keys import Scope

keys = typer.Typer(no_args_is_help=True, help="API keys.")

Key = Annotated[str, typer.Argument(help="The key's id, or its name if only one valid key has it.")]
Scopes = Annotated[
    list[Scope] | None,
    typer.Option("--scope", help="A scope of the key; may be repeated. Default: all scopes of its role."),
]
Days = Annotated[int | None, typer.Option("--expires-days", min=1, help="The key expires after this many days.")]


@keys.command("create")
def create_key_(
    name: Annotated[str, typer.Option("--name", help="A name for the key, for example of its user.")],
    role: Annotated[Role, typer.Option(help="owner: transfers and uses its own prompts; provider: everything.")],
    scope: Scopes = None,
    expires_days: Days = None,
) -> None:
    """Create an API key. It is printed once, to standard output, and can't be shown again."""
    from post_server.auth.audit_log import local_user, record
    from post_server.auth.keys import create_key

    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise InvalidInput("The name of a key must have 1 to 64 printable characters.")
    with services() as (_, database, _), database.write() as session:
        row, text = create_key(session, name=name, role=role, scopes=scope, expires_days=expires_days)
        record(session, local_user(), "key.create", row.id)
    expiry = f", until {when(row.expires_at)} UTC" if row.expires_at else ""
    typer.echo(f"{row.id}  {row.name} ({row.role}){expiry}: keep the key safe; it can't be shown again.", err=True)
    typer.echo(text)


@keys.command("list")
def list_keys_(json: AsJson = False) -> None:
    """All API keys, without their secrets."""
    from post_server.auth.keys import key_document, list_keys

    with services() as (_, database, _), database.read() as session:
        documents = [key_document(row) for row in list_keys(session)]
    if json:
        print_json([key.model_dump(mode="json") for key in documents])
        return
    table = plain_table("id", "name", "role", "scopes", "created", "last used", "expires", "revoked")
    for key in documents:
        times = (when(at) for at in (key.created_at, key.last_used_at, key.expires_at, key.revoked_at))
        table.add_row(key.id, key.name, key.role.value, " ".join(key.scopes), *times)
    print_table(table)


@keys.command("rotate")
def rotate_key_(
    key: Key,
    grace_hours: Annotated[float, typer.Option(min=0, help="How long the old key stays valid.")] = 24.0,
    expires_days: Days = None,
) -> None:
    """Replace a key's secret; the new one is printed once. Its objects and scopes stay; an expiry is renewed."""
    from post_server.auth.audit_log import local_user, record
    from post_server.auth.keys import rotate_key

    with services() as (_, database, _), database.write() as session:
        row, text = rotate_key(session, key, grace_hours=grace_hours, expires_days=expires_days)
        record(session, local_user(), "key.rotate", row.id)
    typer.echo(f"{row.id}  {row.name}: the old key is valid until {when(row.previous_until)} UTC.", err=True)
    typer.echo(text)


@keys.command("limit")
def limit_key_(
    key: Key,
    requests_per_minute: Annotated[int | None, typer.Option(min=0, help="Requests per minute; 0: no limit.")] = None,
    running_jobs: Annotated[int | None, typer.Option(min=0, help="Jobs running at the same time; 0: no limit.")] = None,
    priority: Annotated[
        int, typer.Option(min=-100, max=100, help="Priority of the key's future jobs; higher priorities run first.")
    ] = 0,
) -> None:
    """Set an API key's own limits; an omitted limit is reset to the server's setting."""
    from post_server.auth.audit_log import local_user, record
    from post_server.auth.keys import limit_key

    with services() as (_, database, _), database.write() as session:
        row = limit_key(
            session, key, requests_per_minute=requests_per_minute, running_jobs=running_jobs, job_priority=priority
        )
        record(session, local_user(), "key.limit", row.id)
    limits = f"{_limit(requests_per_minute)} requests per minute, {_limit(running_jobs)} running jobs"
    typer.echo(f"{row.id}  {row.name}: {limits}, priority {priority}")


@keys.command("revoke")
def revoke_key_(key: Key) -> None:
    """Revoke an API key at once."""
    from post_server.auth.audit_log import local_user, record
    from post_server.auth.keys import revoke_key

    with services() as (_, database, _), database.write() as session:
        row = revoke_key(session, key)
        record(session, local_user(), "key.revoke", row.id)
    typer.echo(f"{row.id}  {row.name}: revoked")


def _limit(limit: int | None) -> str:
    return "the server's limit on" if limit is None else f"{limit:,}" if limit else "unlimited"
