"""Removes from the storage what nothing refers to any more, once it is older than a grace period.

A blob that a row names is never removed. The rows are read under the same guard that every writer of blobs takes
before it adds its row, and a writer that finds its blob missing stores it again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import delete, func, select

from post_server.datasets.uploads import delete_expired_uploads
from post_server.db.database import Database, guard
from post_server.db.tables import IdempotencyRow, JobRow, now
from post_server.settings import Settings
from post_server.storage.blob_references import batches, blobs_in_use
from post_server.storage.blob_store import BlobStore


@dataclass(frozen=True)
class Cleaned:
    """How many items of one kind were removed, and their size in bytes."""

    what: str
    count: int
    size: int = 0


def collect_garbage(
    database: Database, store: BlobStore, settings: Settings, *, grace: timedelta, dry_run: bool = False
) -> list[Cleaned]:
    """Remove unreferenced data, or only count it with ``dry_run``. Safe while the server runs, and idempotent."""
    before = now() - grace
    return [
        _uploads(database, store, dry_run),
        _blobs(database, store, before, dry_run),
        _files("temporary files", store.abandoned(before), dry_run),
        _files("cached copies", _unnamed_copies(database, store, before), dry_run),
        _work_folders(database, settings, dry_run),
        _idempotent_answers(database, dry_run),
    ]


def ended_work(settings: Settings, database: Database) -> Iterator[Path]:
    """The work folders on this machine whose jobs have ended, each checked just before it is yielded."""
    folder = settings.home / "work"
    yield from (path for path in (folder.iterdir() if folder.is_dir() else ()) if _has_ended(database, path.name))


def _has_ended(database: Database, job_id: str) -> bool:
    with database.read() as session:
        row = session.get(JobRow, job_id)
    return row is None or row.state.ended


def damaged(database: Database, store: BlobStore, *, hashes: bool) -> Iterator[str]:
    """Every blob named by a row that is missing, or (with ``hashes``, which reads all of them) has other bytes."""
    for sha256 in sorted(_names_in_use(database)):
        if not store.exists(sha256):
            yield f"{sha256} is missing"
        elif hashes and _hash(store, sha256) != sha256:
            yield f"{sha256} holds other bytes"


def _hash(store: BlobStore, sha256: str) -> str:
    digest = hashlib.sha256()
    for chunk in store.open(sha256):
        digest.update(chunk)
    return digest.hexdigest()


def _names_in_use(database: Database) -> set[str]:
    with database.read() as session:
        return blobs_in_use(session)


def _uploads(database: Database, store: BlobStore, dry_run: bool) -> Cleaned:
    with database.write() as session:
        return Cleaned("abandoned dataset uploads", delete_expired_uploads(session, store, dry_run=dry_run))


def _blobs(database: Database, store: BlobStore, before: datetime, dry_run: bool) -> Cleaned:
    old = (blob for blob in store.blobs() if blob.stored_at < before)
    count = size = 0
    for batch in batches(old):
        with database.write() as session:
            guard(session)
            used = blobs_in_use(session)
            for blob in batch:
                if blob.sha256 not in used:
                    count, size = count + 1, size + blob.size
                    if not dry_run:
                        store.delete(blob.sha256)
    return Cleaned("unreferenced blobs", count, size)


def _unnamed_copies(database: Database, store: BlobStore, before: datetime) -> Iterator[Path]:
    """Only old copies: a worker may be making one for a row that is added after the names are read."""
    old = list(store.cached(before))
    used = _names_in_use(database)
    return (path for path in old if path.name not in used)


def _work_folders(database: Database, settings: Settings, dry_run: bool) -> Cleaned:
    count = size = 0
    for folder in ended_work(settings, database):
        count, size = count + 1, size + _size(folder)
        if not dry_run and _has_ended(database, folder.name):  # it may have been queued again meanwhile
            shutil.rmtree(folder, ignore_errors=True)
    return Cleaned("work folders of ended jobs", count, size)


def _files(what: str, paths: Iterable[Path], dry_run: bool) -> Cleaned:
    count = size = 0
    for path in list(paths):
        count, size = count + 1, size + _bytes(path)
        if not dry_run:
            path.unlink(missing_ok=True)
    return Cleaned(what, count, size)


def _idempotent_answers(database: Database, dry_run: bool) -> Cleaned:
    """Stored answers whose idempotency keys have expired."""
    expired = IdempotencyRow.created_at < now() - IdempotencyRow.kept
    with database.write() as session:
        count = session.scalar(select(func.count()).select_from(IdempotencyRow).where(expired)) or 0
        if not dry_run:
            session.execute(delete(IdempotencyRow).where(expired))
    return Cleaned("expired idempotent answers", count)


def _size(folder: Path) -> int:
    return sum(_bytes(path) for path in folder.rglob("*") if path.is_file())


def _bytes(path: Path) -> int:
    """0 if it is gone: another run, or a worker, has removed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
