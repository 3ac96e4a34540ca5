"""Who did what to which object: only ids and names of actions, never a text, a tensor or an API key.

A row is added in the transaction of the action itself, so neither exists without the other. The database refuses to
update or delete rows (see migration 0007).
"""

from __future__ import annotations

import getpass
from datetime import timedelta

import structlog
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from post_server.db.tables import AuditRow, now


def record(session: Session, who: str, action: str, thing: str) -> None:
    """Add a line. ``who`` is the id of a key or :func:`local_user`; the request id, if any, is added."""
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    session.add(AuditRow(who=who, action=action, thing=thing, request_id=request_id))


def local_user() -> str:
    """The user of this machine, for the provider's commands, which use no API key."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        name = "unknown"
    return f"local:{name}"[:64]


def lines(
    session: Session,
    *,
    who: str | None = None,
    action: str | None = None,
    thing: str | None = None,
    days: float | None = None,
    limit: int = 100,
) -> list[AuditRow]:
    """The newest matching lines, newest first. The action ``prompt`` also matches ``prompt.…``."""
    statement = select(AuditRow)
    if who is not None:
        statement = statement.where(AuditRow.who == who)
    if action is not None:
        has_prefix = AuditRow.action.startswith(f"{action}.", autoescape=True)
        statement = statement.where(or_(AuditRow.action == action, has_prefix))
    if thing is not None:
        statement = statement.where(AuditRow.thing == thing)
    if days is not None:
        statement = statement.where(AuditRow.at >= now() - timedelta(days=days))
    return list(session.scalars(statement.order_by(AuditRow.id.desc()).limit(limit)))
