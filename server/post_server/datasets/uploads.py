"""Datasets that come in parts: each part is a blob, the row remembers their order until all are here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from post_server.datasets.service import name_is_free
from post_server.db.database import guard
from post_server.db.tables import ApiKeyRow, UploadRow, now
from post_server.settings import Settings
from post_server.storage.blob_references import drop_unnamed
from post_server.storage.blob_store import BlobStore
from post_shared.errors import Conflict, IntegrityError, InvalidInput, NotFound, PayloadTooLarge
from post_shared.schemas.uploads import MAX_PARTS, Upload, UploadCreate, UploadPart

LIFE = timedelta(days=1)


def begin_upload(session: Session, store: BlobStore, caller: ApiKeyRow, order: UploadCreate) -> UploadRow:
    """A new upload without parts. Those that were forgotten are cleared away.

    Raises:
        Conflict: there is a dataset of that name.
    """
    guard(session)
    forget_old_uploads(session, store)
    name_is_free(session, order.name)
    row = UploadRow(owner_key_id=caller.id, parts=[], **order.model_dump())
    session.add(row)
    session.flush()
    return row


def forget_old_uploads(session: Session, store: BlobStore, *, dry_run: bool = False) -> int:
    """Clear away the uploads whose day is over; how many there were."""
    guard(session)
    forgotten = session.scalars(select(UploadRow).where(UploadRow.created_at < now() - LIFE)).all()
    for row in forgotten if not dry_run else ():
        remove_upload(session, store, row)
    return len(forgotten)


def visible_upload(session: Session, caller: ApiKeyRow, upload_id: str) -> UploadRow:
    """The caller's own upload. Whoever then changes it calls :func:`guard` first; to look at it waits for nobody.

    Raises:
        NotFound: there is none, it is another key's, or its day is over (the answer doesn't tell which).
    """
    row = session.get(UploadRow, upload_id)
    if row is None or row.owner_key_id != caller.id or row.created_at < now() - LIFE:
        raise NotFound(f"There is no upload {upload_id!r}; begin a new one.", upload=upload_id)
    return row


def add_part(
    session: Session, store: BlobStore, row: UploadRow, number: int, file: Path, sha256: str, settings: Settings
) -> None:
    """Keep a received part, whose hash is known; the same number again replaces it.

    Raises:
        InvalidInput: it is empty.
        PayloadTooLarge: all parts together are more than a dataset may have.
    """
    size = file.stat().st_size
    if size == 0:
        raise InvalidInput("The part is empty.")
    others = [each for each in row.parts if each["number"] != number]
    if size + sum(each["size_bytes"] for each in others) > settings.dataset_bytes:
        raise PayloadTooLarge(f"A dataset has {settings.dataset_bytes} bytes at most.", limit=settings.dataset_bytes)
    replaced = [each for each in row.parts if each["number"] == number]
    part = UploadPart(number=number, sha256=store.adopt(file, sha256), size_bytes=size)
    row.parts = sorted([*others, part.model_dump()], key=lambda each: int(each["number"]))
    session.flush()
    drop_unnamed(session, store, _hashes(replaced))


def check_whole(row: UploadRow) -> None:
    """Raise :class:`Conflict` unless the parts are 1, 2, 3 … without a gap."""
    numbers = [each["number"] for each in row.parts]
    missing = sorted(set(range(1, max(numbers, default=1) + 1)) - set(numbers))
    if missing:
        raise Conflict(f"The part {missing[0]} is missing; send it first.", missing=missing[:20])


def join_parts(store: BlobStore, parts: Sequence[dict[str, Any]], sha256: str | None, file: Path) -> None:
    """Write all parts, one after the other.

    Raises:
        IntegrityError: a stored part has changed.
        InvalidInput: together they have another hash than the caller says.
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
        raise InvalidInput(f"The parts together have the SHA-256 {whole.hexdigest()}, not {sha256}.")


def remove_upload(session: Session, store: BlobStore, row: UploadRow) -> None:
    """Forget an upload, and the bytes of its parts that nothing else has."""
    guard(session)
    session.delete(row)
    session.flush()
    drop_unnamed(session, store, _hashes(row.parts))


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
            "expires_at": row.created_at + LIFE,
        }
    )
