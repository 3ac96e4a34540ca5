"""API keys: random, shown once, kept only as a hash."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from post_server.records import ApiKeyRow, now
from post_shared.errors import NotFound, Unauthenticated
from post_shared.schemas import ApiKey, Role

PREFIX = "post_"
_RANDOM_BYTES = 32  # so many that a plain hash is enough: nobody can guess one


def create_key(session: Session, *, name: str, role: Role) -> tuple[ApiKeyRow, str]:
    """A new key; the text is returned here and can never be shown again."""
    text = PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    row = ApiKeyRow(name=name, role=role, key_hash=_hash(text))
    session.add(row)
    session.flush()
    return row, text


def authenticate(session: Session, text: str) -> ApiKeyRow:
    """The row of a key that is valid now.

    Raises:
        Unauthenticated: it is unknown or revoked (the answer doesn't tell which).
    """
    digest = _hash(text)
    row = session.scalar(select(ApiKeyRow).where(ApiKeyRow.key_hash == digest))
    if row is None or not hmac.compare_digest(row.key_hash, digest) or row.revoked_at is not None:
        raise Unauthenticated("The API key is not valid; pass a current one as 'Authorization: Bearer post_…'.")
    return row


def list_keys(session: Session) -> list[ApiKeyRow]:
    """All keys, oldest first, the revoked ones too."""
    return list(session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at, ApiKeyRow.id)))


def revoke_key(session: Session, reference: str) -> ApiKeyRow:
    """End a key by its id, or by its name when one valid key has it.

    Raises:
        NotFound: no valid key, or more than one, fits.
    """
    statement = select(ApiKeyRow).where(
        or_(ApiKeyRow.id == reference, ApiKeyRow.name == reference), ApiKeyRow.revoked_at.is_(None)
    )
    found = list(session.scalars(statement))
    if len(found) != 1:
        raise NotFound(f"{len(found)} valid keys fit {reference!r}; pass the id that 'post key list' shows.")
    found[0].revoked_at = now()
    return found[0]


def key_document(row: ApiKeyRow) -> ApiKey:
    """The row without its hash."""
    return ApiKey.model_validate({name: getattr(row, name) for name in ApiKey.model_fields})


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
