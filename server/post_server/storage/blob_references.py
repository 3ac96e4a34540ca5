"""Which blobs the rows refer to, and the removal of those that a change leaves unreferenced.

They are removed after the commit: a failed change loses nothing, and a failing store only leaves garbage, which
``post admin collect-garbage`` removes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy import event, select
from sqlalchemy.orm import Session

from post_server.db.database import Database, guard
from post_server.db.tables import DatasetRow, ModelRow, PromptRow, UploadRow
from post_server.logs import error_location
from post_server.storage.blob_store import BlobStore

T = TypeVar("T")

BATCH = 50
"""Blobs handled while the guard is held, so that nobody waits long."""
_BY_HASH = (PromptRow.sha256, DatasetRow.sha256)
_IN_LISTS = (UploadRow.parts, ModelRow.files)
"""All columns that refer to blobs."""

log = structlog.get_logger("post.storage")


def blobs_in_use(session: Session) -> set[str]:
    """The SHA-256 of every blob that a row refers to."""
    entries = (entry for column in _IN_LISTS for files in session.scalars(select(column)) for entry in files)
    listed = {str(entry["sha256"]) for entry in entries}
    return listed.union(*(session.scalars(select(column)) for column in _BY_HASH))


def delete_unreferenced(session: Session, store: BlobStore, hashes: Iterable[str]) -> None:
    """After this transaction's commit, delete those of the blobs that no row refers to."""
    candidates = sorted(set(hashes))
    if candidates:
        event.listen(session, "after_commit", lambda _: _delete(session.get_bind(), store, candidates), once=True)


@contextmanager
def uploaded_early(database: Database, store: BlobStore, file: Path, sha256: str) -> Iterator[None]:
    """Upload a file before the transaction that adopts it, and remove its bytes if that transaction fails."""
    uploaded = store.upload_early(file, sha256)
    try:
        yield
    except Exception:
        if uploaded:
            with database.write() as session:
                delete_unreferenced(session, store, [sha256])
        raise


def batches(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of up to :data:`BATCH` items."""
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def _delete(bind: Any, store: BlobStore, hashes: list[str]) -> None:
    try:
        for batch in batches(hashes):
            with Session(bind) as session, session.begin():
                guard(session)
                for sha256 in set(batch) - blobs_in_use(session):
                    store.delete(sha256)
    except Exception as error:  # any error: the change is committed, and garbage collection removes the rest
        log.warning("blobs not removed", error=type(error).__name__, where=error_location(error))
