"""Clean the storage up: what nothing refers to any more, and has lain there for longer than a grace time.

A blob that a row names is never removed. The rows are read under the same guard that every writer of blobs takes
before it adds its row, and a writer that finds its blob gone stores it again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path

from sqlalchemy import delete, func, select

from post_server.database import Database, guard
from post_server.prompt_store import blobs_in_use
from post_server.records import IdempotencyRow, JobRow, now
from post_server.settings import Settings
from post_server.storage import Blob, BlobStore
from post_server.upload_store import forget_old_uploads

_BATCH = 100
"""Blobs for which the guard is held at a time, so that nobody waits long."""


@dataclass(frozen=True)
class Cleaned:
    """So many of a kind, and the bytes that they held."""

    what: str
    count: int
    size: int = 0


def clean(
    database: Database, store: BlobStore, settings: Settings, *, grace: timedelta, dry_run: bool = False
) -> list[Cleaned]:
    """Remove what is of no use, or with ``dry_run`` only count it. Safe while everything runs, and to run twice."""
    before = now() - grace
    folders = ended_work(settings, database)
    kept = _names_in_use(database)
    found = [
        _uploads(database, store, dry_run),
        _blobs(database, store, before, dry_run),
        _files("temporary files", store.abandoned(before), dry_run),
        _files("cached copies", (path for path in store.cached() if path.name not in kept), dry_run),
        Cleaned("work folders of ended jobs", len(folders), sum(_size(path) for path in folders)),
        _answers(database, dry_run),
    ]
    for folder in folders if not dry_run else ():
        shutil.rmtree(folder, ignore_errors=True)
    return found


def ended_work(settings: Settings, database: Database) -> list[Path]:
    """The work folders on this machine whose jobs have ended."""
    folder = settings.home / "work"
    paths = list(folder.iterdir()) if folder.is_dir() else []
    with database.read() as session:
        rows = {path: session.get(JobRow, path.name) for path in paths}
    return [path for path, row in rows.items() if row is None or row.state.ended]


def damaged(database: Database, store: BlobStore, *, hashes: bool) -> Iterator[str]:
    """Every blob that a row names and that is missing, or (with ``hashes``, which reads all) holds other bytes."""
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
        return Cleaned("forgotten uploads of datasets", forget_old_uploads(session, store, dry_run=dry_run))


def _blobs(database: Database, store: BlobStore, before: datetime, dry_run: bool) -> Cleaned:
    old = (blob for blob in store.blobs() if blob.stored_at < before)
    count = size = 0
    for batch in _batches(old):
        with database.write() as session:
            guard(session)
            used = blobs_in_use(session)
            for blob in batch:
                if blob.sha256 not in used:
                    count, size = count + 1, size + blob.size
                    if not dry_run:
                        store.delete(blob.sha256)
    return Cleaned("blobs that nothing names", count, size)


def _batches(blobs: Iterable[Blob]) -> Iterator[list[Blob]]:
    each = iter(blobs)
    while batch := list(islice(each, _BATCH)):
        yield batch


def _files(what: str, paths: Iterable[Path], dry_run: bool) -> Cleaned:
    count = size = 0
    for path in list(paths):
        count, size = count + 1, size + path.stat().st_size
        if not dry_run:
            path.unlink(missing_ok=True)
    return Cleaned(what, count, size)


def _answers(database: Database, dry_run: bool) -> Cleaned:
    """Answers to creates that nobody may ask for again."""
    expired = IdempotencyRow.created_at < now() - IdempotencyRow.kept
    with database.write() as session:
        count = session.scalar(select(func.count()).select_from(IdempotencyRow).where(expired)) or 0
        if not dry_run:
            session.execute(delete(IdempotencyRow).where(expired))
    return Cleaned("expired idempotent answers", count)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
