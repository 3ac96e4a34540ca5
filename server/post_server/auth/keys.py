"""API keys: random, shown once, stored as a hash. A key has scopes, may expire and can be rotated."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import bindparam, or_, select, update
from sqlalchemy.orm import Session

from post_server.db.tables import ApiKeyRow, now
from post_shared.errors import Forbidden, InvalidInput, KeyExpired, NotFound, Unauthenticated
from post_shared.schemas.common import Role
from post_shared.schemas.keys import SCOPES, ApiKey, Scope

PREFIX = "post_"
_RANDOM_BYTES = 32  # enough entropy for a plain hash: keys can't be guessed
_USE_INTERVAL = timedelta(minutes=1)
"""The last use is written at most this often, so that a busy key doesn't cost a write per request."""
_BY_HASH = select(ApiKeyRow).where(
    or_(ApiKeyRow.key_hash == bindparam("digest"), ApiKeyRow.previous_hash == bindparam("digest"))
)
"""Built once: building it for each request would take longer than the query."""


def create_key(
    session: Session,
    *,
    name: str,
    role: Role,
    scopes: Collection[Scope] | None = None,
    expires_days: float | None = None,
) -> tuple[ApiKeyRow, str]:
    """A new key. Its text is returned only here. Without ``scopes`` it has those of its role.

    Raises:
        InvalidInput: a scope that the role doesn't have.
    """
    if surplus := set(scopes or ()) - set(SCOPES[role]):
        raise InvalidInput(f"A key with the role {role} can't have the scope {sorted(surplus)[0]!r}.")
    text = _new_text()
    row = ApiKeyRow(
        name=name,
        role=role,
        key_hash=_hash(text),
        scopes=None if scopes is None else [scope.value for scope in SCOPES[role] if scope in scopes],
        expires_at=None if expires_days is None else now() + timedelta(days=expires_days),
    )
    session.add(row)
    session.flush()
    return row, text


def authenticate(session: Session, text: str) -> ApiKeyRow:
    """The row of a key that is valid now.

    Raises:
        Unauthenticated: it is unknown or revoked (the response doesn't tell which).
        KeyExpired: it has expired.
    """
    digest = _hash(text)
    row = session.scalar(_BY_HASH, {"digest": digest})
    if row is None:
        raise Unauthenticated("The API key is invalid; pass a valid one as 'Authorization: Bearer post_…'.")
    _check_validity(row, row.expires_at if row.key_hash == digest else row.previous_until)
    return row


def check_still_valid(session: Session, key_id: str) -> None:
    """Check an authenticated key again during a long request.

    Raises:
        Unauthenticated: the key has been revoked meanwhile.
        KeyExpired: it has expired.
    """
    row = session.get_one(ApiKeyRow, key_id)
    _check_validity(row, row.expires_at)


def note_use(session: Session, key_id: str) -> None:
    """Store the time of the key's last use, unless that was done recently."""
    at = now()
    due = or_(ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < at - _USE_INTERVAL)
    statement = update(ApiKeyRow).where(ApiKeyRow.id == key_id, due).values(last_used_at=at)
    session.execute(statement.execution_options(synchronize_session=False))


def use_is_due(row: ApiKeyRow) -> bool:
    """Whether :func:`note_use` would write something."""
    return row.last_used_at is None or row.last_used_at < now() - _USE_INTERVAL


def scopes_of(row: ApiKeyRow) -> tuple[Scope, ...]:
    """The key's own scopes, as far as its role has them, or all scopes of its role."""
    return tuple(scope for scope in SCOPES[row.role] if row.scopes is None or scope.value in row.scopes)


def check_scope(row: ApiKeyRow, scope: Scope) -> None:
    """Raise :class:`Forbidden` when the key lacks the scope."""
    if scope in scopes_of(row):
        return
    if scope not in SCOPES[row.role]:
        raise Forbidden("This needs a key with the role 'provider'.")
    raise Forbidden(f"This key lacks the scope {scope.value!r}; ask the provider for a key with it.", scope=scope)


def list_keys(session: Session) -> list[ApiKeyRow]:
    """All keys, oldest first, including revoked ones."""
    return list(session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at, ApiKeyRow.id)))


def find_key(session: Session, reference: str) -> ApiKeyRow:
    """The key that isn't revoked and has this id, or the only one with this name.

    Raises:
        NotFound: no key, or more than one, matches.
    """
    statement = select(ApiKeyRow).where(
        or_(ApiKeyRow.id == reference, ApiKeyRow.name == reference), ApiKeyRow.revoked_at.is_(None)
    )
    keys = list(session.scalars(statement))
    if len(keys) != 1:
        raise NotFound(f"{len(keys)} valid keys match {reference!r}; pass an id from 'post key list'.")
    return keys[0]


def rotate_key(
    session: Session, reference: str, *, grace_hours: float, expires_days: float | None = None
) -> tuple[ApiKeyRow, str]:
    """Give a key a new text. The old one stays valid for the grace time, at most until its expiry; older ones end.

    Raises:
        NotFound: no valid key, or more than one, matches.
    """
    row, at, text = find_key(session, reference), now(), _new_text()
    until = at + timedelta(hours=grace_hours)
    row.previous_hash = row.key_hash
    row.previous_until = until if row.expires_at is None else min(until, row.expires_at)
    if expires_days is not None:
        row.expires_at = at + timedelta(days=expires_days)
    elif row.expires_at is not None:  # the same lifetime as before
        row.expires_at = at + (row.expires_at - (row.rotated_at or row.created_at))
    row.key_hash, row.rotated_at = _hash(text), at
    return row, text


def limit_key(
    session: Session,
    reference: str,
    *,
    requests_per_minute: int | None = None,
    running_jobs: int | None = None,
    job_priority: int = 0,
) -> ApiKeyRow:
    """Set a key's own limits (None: the server's) and the priority of its future jobs.

    Raises:
        NotFound: no valid key, or more than one, matches.
    """
    row = find_key(session, reference)
    row.requests_per_minute, row.running_jobs, row.job_priority = requests_per_minute, running_jobs, job_priority
    return row


def revoke_key(session: Session, reference: str) -> ApiKeyRow:
    """Revoke a key by its id, or by its name if only one valid key has it.

    Raises:
        NotFound: no valid key, or more than one, matches.
    """
    row = find_key(session, reference)
    row.revoked_at = now()
    return row


def key_document(row: ApiKeyRow) -> ApiKey:
    """The row without its hash."""
    members = {name: getattr(row, name) for name in ApiKey.model_fields}
    return ApiKey.model_validate(members | {"scopes": scopes_of(row)})


def _check_validity(row: ApiKeyRow, until: datetime | None) -> None:
    if row.revoked_at is not None:
        raise Unauthenticated("The API key is invalid; pass a valid one as 'Authorization: Bearer post_…'.")
    if until is not None and until <= now():
        raise KeyExpired(
            f"The API key expired on {until:%Y-%m-%d %H:%M} UTC; ask the provider for a new one (post key rotate)."
        )


def _new_text() -> str:
    return PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
