"""Cursor pagination: the next page begins after the last row of this one, whatever was added in between."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query
from sqlalchemy import Select, and_, or_
from sqlalchemy.orm import Session

from post_shared.errors import InvalidInput
from post_shared.schemas.common import Page

MAX_LIMIT = 200
Row = TypeVar("Row", bound=Any)
Item = TypeVar("Item")


@dataclass(frozen=True)
class PageRequest:
    """Which page a caller wants."""

    limit: int
    cursor: str | None


async def _page_request(
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Maximum items per page.")] = 50,
    cursor: Annotated[str | None, Query(max_length=200, description="`next_cursor` of the previous page.")] = None,
) -> PageRequest:
    return PageRequest(limit, cursor)


Paging = Annotated[PageRequest, Depends(_page_request)]


def paginate(
    session: Session,
    statement: Select[Any],
    table: type[Row],
    paging: PageRequest,
    document: Callable[[Row], Item],
) -> Page[Item]:
    """One page of the rows that the statement selects, newest first.

    Raises:
        InvalidInput: the cursor is malformed.
    """
    if paging.cursor is not None:
        at, row_id = _decode(paging.cursor)
        older = or_(table.created_at < at, and_(table.created_at == at, table.id < row_id))
        statement = statement.where(older)
    statement = statement.order_by(table.created_at.desc(), table.id.desc()).limit(paging.limit + 1)
    rows = list(session.scalars(statement))
    last = rows[paging.limit - 1] if len(rows) > paging.limit else None
    return Page(
        items=[document(row) for row in rows[: paging.limit]],
        next_cursor=None if last is None else _encode(last.created_at, last.id),
    )


def _encode(at: datetime, row_id: str) -> str:
    return base64.urlsafe_b64encode(f"{at.isoformat()}|{row_id}".encode()).decode().rstrip("=")


def _decode(cursor: str) -> tuple[datetime, str]:
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        at, row_id = base64.b64decode(padded, altchars=b"-_", validate=True).decode("ascii").split("|")
        return datetime.fromisoformat(at).astimezone(UTC), row_id
    except (ValueError, OverflowError, OSError):
        raise InvalidInput("The cursor is invalid; start again without one.") from None
