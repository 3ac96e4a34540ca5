"""Which blobs the rows name, and the removal of those that a change has left without a name.

They are removed once the change stands: a change that fails has lost nothing, and a store that fails has cost nothing
but room, which ``post admin clean`` makes.
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
from post_server.logs import where
from post_server.storage.blob_store import BlobStore

T = TypeVar("T")

BATCH = 50
"""Blobs for which the guard is held at a time, so that nobody waits long."""
_BY_HASH = (PromptRow.sha256, DatasetRow.sha256)
_IN_LISTS = (UploadRow.parts, ModelRow.files)
"""Every column that names blobs."""

log = structlog.get_logger("post.storage")


def blobs_in_use(session: Session) -> set[str]:
    """The SHA-256 of every blob that a row names."""
    entries = (entry for column in _IN_LISTS for each in session.scalars(select(column)) for entry in each)
    listed = {str(entry["sha256"]) for entry in entries}
    return listed.union(*(session.scalars(select(column)) for column in _BY_HASH))


def drop_unnamed(session: Session, store: BlobStore, hashes: Iterable[str]) -> None:
    """Once this transaction stands, remove those of the blobs that no row names then."""
    left = sorted(set(hashes))
    if left:
        event.listen(session, "after_commit", lambda _: _drop(session.get_bind(), store, left), once=True)


@contextmanager
def sent_ahead(database: Database, store: BlobStore, file: Path, sha256: str) -> Iterator[None]:
    """For the transaction that will adopt the file: its bytes are sent before that, and removed if it fails."""
    sent = store.send_ahead(file, sha256)
    try:
        yield
    except Exception:
        if sent:
            with database.write() as session:
                drop_unnamed(session, store, [sha256])
        raise


def batches(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of up to :data:`BATCH` items."""
    each = iter(items)
    while batch := list(islice(each, BATCH)):
        yield batch


def _drop(bind: Any, store: BlobStore, hashes: list[str]) -> None:
    try:
        for batch in batches(hashes):
            with Session(bind) as session, session.begin():
                guard(session)
                for sha256 in set(batch) - blobs_in_use(session):
                    store.delete(sha256)
    except Exception as error:  # whatever it is: the change stands, and a clean-up removes what is left
        log.warning("blobs not removed", error=type(error).__name__, where=where(error))
