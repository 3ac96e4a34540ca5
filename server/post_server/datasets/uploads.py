"""Datasets uploaded in parts: each part is a blob, and the row keeps their order until the upload is finished."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from post_server.datasets.service import check_name_is_free
from post_server.db.database import guard
from post_server.db.tables import ApiKeyRow, UploadRow, now
from post_server.settings import Settings
from post_server.storage.blob_references import delete_unreferenced
from post_server.storage.blob_store import BlobStore
from post_shared.errors import Conflict, IntegrityError, InvalidInput, NotFound, PayloadTooLarge
from post_shared.schemas.uploads import MAX_PARTS, Upload, UploadCreate, UploadPart

LIFETIME = timedelta(days=1)


def begin_upload(session: Session, store: BlobStore, caller: ApiKeyRow, request: UploadCreate) -> UploadRow:
    """A new upload without parts. Expired uploads are deleted.

    Raises:
        Conflict: a dataset has that name.
    """
    guard(session)
    delete_expired_uploads(session, store)
    check_name_is_free(session, request.name)
    row = UploadRow(owner_key_id=caller.id, parts=[], **request.model_dump())
    session.add(row)
    session.flush()
    return row


def delete_expired_uploads(session: Session, store: BlobStore, *, dry_run: bool = False) -> int:
    """Delete expired uploads and return their number."""
    guard(session)
    expired = session.scalars(select(UploadRow).where(UploadRow.created_at < now() - LIFETIME)).all()
    for row in expired if not dry_run else ():
        remove_upload(session, store, row)
    return len(expired)


def visible_upload(session: Session, caller: ApiKeyRow, upload_id: str) -> UploadRow:
    """The caller's own upload. Call :func:`guard` first to change it; reading it needs no guard.

    Raises:
        NotFound: it doesn't exist, belongs to another key or has expired (the response doesn't tell which).
    """
    row = session.get(UploadRow, upload_id)
    if row is None or row.owner_key_id != caller.id or row.created_at < now() - LIFETIME:
        raise NotFound(f"There is no upload {upload_id!r}; begin a new one.", upload=upload_id)
    return row


def add_part(
    session: Session, store: BlobStore, row: UploadRow, number: int, file: Path, sha256: str, settings: Settings
) -> None:
    """Store a received part, whose hash is known; it replaces an earlier part with the same number.

    Raises:
        InvalidInput: it is empty.
        PayloadTooLarge: all parts together exceed the maximum size of a dataset.
    """
    size = file.stat().st_size
    if size == 0:
        raise InvalidInput("The part is empty.")
    others = [part for part in row.parts if part["number"] != number]
    if size + sum(part["size_bytes"] for part in others) > settings.dataset_bytes:
        limit = settings.dataset_bytes
        raise PayloadTooLarge(f"A dataset may have at most {limit} bytes.", limit=limit)
    replaced = [part for part in row.parts if part["number"] == number]
    new = UploadPart(number=number, sha256=store.adopt(file, sha256), size_bytes=size)
    row.parts = sorted([*others, new.model_dump()], key=lambda part: int(part["number"]))
    session.flush()
    delete_unreferenced(session, store, _hashes(replaced))


def check_complete(row: UploadRow) -> None:
    """Raise :class:`Conflict` unless the parts are numbered 1, 2, 3, … without a gap."""
    numbers = [part["number"] for part in row.parts]
    missing = sorted(set(range(1, max(numbers, default=1) + 1)) - set(numbers))
    if missing:
        raise Conflict(f"Part {missing[0]} is missing; send it first.", missing=missing[:20])


def join_parts(store: BlobStore, parts: Sequence[dict[str, Any]], sha256: str | None, file: Path) -> None:
    """Write all parts, one after the other.

    Raises:
        IntegrityError: a stored part has changed.
        InvalidInput: the joined file doesn't have the caller's hash.
    """
    whole = hashlib.sha256()
    with file.open("wb") as target:
        for part in parts:
            digest = hashlib.sha256()
            for chunk in store.open(part["sha256"]):
                digest.update(chunk)
                whole.update(chunk)
                target.write(chunk)
            if digest.hexdigest() != part["sha256"]:
                raise IntegrityError(f"The stored part {part['number']} has changed; send it again.")
    if sha256 is not None and whole.hexdigest() != sha256:
        raise InvalidInput(f"The joined parts have the SHA-256 {whole.hexdigest()}, not {sha256}.")


def remove_upload(session: Session, store: BlobStore, row: UploadRow) -> None:
    """Delete an upload and those of its parts' blobs that nothing else refers to."""
    guard(session)
    session.delete(row)
    session.flush()
    delete_unreferenced(session, store, _hashes(row.parts))


def _hashes(parts: Iterable[dict[str, Any]]) -> list[str]:
    return [part["sha256"] for part in parts]


def upload_document(row: UploadRow, settings: Settings) -> Upload:
    """The row as the API shows it."""
    members = ("id", "name", "kind", "licence", "parts", "created_at")
    return Upload.model_validate(
        {name: getattr(row, name) for name in members}
        | {
            "part_bytes": settings.part_bytes,
            "total_bytes": settings.dataset_bytes,
            "most_parts": MAX_PARTS,
            "expires_at": row.created_at + LIFETIME,
        }
    )
