"""Who did what to which thing. Ids and the names of actions only: never a text, a tensor or a key's text.

Rows are added in the transaction that does the thing, so one never stands without the other. The database itself
refuses to change or remove them (see migration 0007).
"""

from __future__ import annotations

import getpass
from datetime import timedelta

import structlog
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from post_server.db.tables import AuditRow, now


def record(session: Session, who: str, action: str, thing: str) -> None:
    """Add a line. ``who`` is the id of a key, or :func:`local_user`; the request's id is added where there is one."""
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    session.add(AuditRow(who=who, action=action, thing=thing, request_id=request_id))


def local_user() -> str:
    """Who is at this machine: the provider's commands act on the store and carry no key."""
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
    """The newest lines that fit, newest first. ``action`` also fits those that begin with it and a dot."""
    statement = select(AuditRow)
    if who is not None:
        statement = statement.where(AuditRow.who == who)
    if action is not None:
        begins = AuditRow.action.startswith(f"{action}.", autoescape=True)
        statement = statement.where(or_(AuditRow.action == action, begins))
    if thing is not None:
        statement = statement.where(AuditRow.thing == thing)
    if days is not None:
        statement = statement.where(AuditRow.at >= now() - timedelta(days=days))
    return list(session.scalars(statement.order_by(AuditRow.id.desc()).limit(limit)))
