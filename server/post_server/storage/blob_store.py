"""Blobs: bytes named by their SHA-256, in a folder or in any store that fsspec supports.

A blob never changes, so writing it twice is harmless, and readers never see a partial one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec

from post_server.settings import Settings
from post_shared.errors import IntegrityError, NotFound

CHUNK_BYTES = 1 << 20
_READ_AHEAD_BYTES = 8 * CHUNK_BYTES  # per reader of an object store
_FRESH = timedelta(hours=1)
_ABANDONED_SECONDS = 24 * 3600.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """A stored blob. Storing it again renews ``stored_at``."""

    sha256: str
    size: int
    stored_at: datetime


class BlobStore:
    """A content-addressed store at an fsspec URL (``file:///…``, ``s3://bucket/prefix``, ``memory://…``).

    ``cache`` is a local folder for blobs of a remote store that have to be memory-mapped; a ``file://`` store
    needs none. Temporary files are on the destination's file system, so that a rename publishes a blob atomically.
    """

    def __init__(self, storage_url: str, cache: Path | None = None) -> None:
        self._is_local = urlsplit(storage_url).scheme in ("", "file", "local")
        # A cached listing would hide what other processes store and delete.
        self._fs, root = fsspec.core.url_to_fs(storage_url, use_listings_cache=False)
        self._root = str(root).rstrip("/")
        self._cache = Path(self._root) if self._is_local else cache or Path(tempfile.gettempdir()) / "post-blobs"
        (self._cache / "tmp").mkdir(parents=True, exist_ok=True, mode=0o700)

    @classmethod
    def from_settings(cls, settings: Settings) -> BlobStore:
        """The store of the settings, with its cache in the home folder."""
        return cls(settings.storage_url, cache=settings.home / "cache" / "blobs")

    def put(self, source: Path | bytes | IO[bytes]) -> str:
        """Store the bytes and return their SHA-256."""
        temporary = self.new_file()
        try:
            sha256 = _copy_and_hash(source, temporary)
            self._adopt(temporary, sha256)
        finally:
            temporary.unlink(missing_ok=True)
        return sha256

    def new_file(self) -> Path:
        """An empty temporary file; pass it to :meth:`adopt` once it is complete, or unlink it."""
        handle, name = tempfile.mkstemp(dir=self._cache / "tmp")
        os.close(handle)
        return Path(name)

    def adopt(self, temporary: Path, sha256: str) -> str:
        """Store a file from :meth:`new_file`, whose hash is known, by renaming it."""
        try:
            self._adopt(temporary, sha256)
        finally:
            temporary.unlink(missing_ok=True)
        return sha256

    def upload_early(self, temporary: Path, sha256: str) -> bool:
        """Upload a file to a remote store, so that :meth:`adopt` is quick while other writers are blocked.

        Returns:
            Whether it was uploaded. If it isn't adopted afterwards, it is an unreferenced blob.
        """
        if not self._is_local:
            self._adopt(temporary, sha256)
        return not self._is_local

    def sweep(self, seconds: float = _ABANDONED_SECONDS) -> None:
        """Remove temporary files older than ``seconds``, left by killed processes."""
        before = time.time() - seconds
        for path in (self._cache / "tmp").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()

    def exists(self, sha256: str) -> bool:
        """Whether the blob is stored."""
        return bool(self._fs.exists(self._key(sha256)))

    def size(self, sha256: str) -> int:
        """Its number of bytes."""
        try:
            return int(self._fs.size(self._key(sha256)))
        except FileNotFoundError:
            raise _missing(sha256) from None

    def open(self, sha256: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from ``start`` up to ``stop`` (exclusive) in chunks; a missing blob raises at once."""
        try:
            stream = self._fs.open(self._key(sha256), "rb", block_size=_READ_AHEAD_BYTES)
        except FileNotFoundError:
            raise _missing(sha256) from None
        return _chunks(stream, start, stop)

    def read(self, sha256: str) -> bytes:
        """All bytes of a small blob, checked against their hash."""
        data = b"".join(self.open(sha256))
        if hashlib.sha256(data).hexdigest() != sha256:
            raise IntegrityError(f"The stored bytes of {sha256} have changed; restore them from a backup.")
        return data

    def local_path(self, sha256: str) -> Path:
        """A local, read-only file of the bytes; a remote blob is downloaded once."""
        path = self._cached(sha256)
        if path.exists():
            return path
        if self._is_local:
            raise _missing(sha256)
        temporary = self.new_file()
        try:
            digest = hashlib.sha256()
            with temporary.open("wb") as target:
                for chunk in self.open(sha256):
                    digest.update(chunk)
                    target.write(chunk)
            if digest.hexdigest() != sha256:
                raise IntegrityError(f"The downloaded bytes of {sha256} don't match this hash; try again.")
            _publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def delete(self, sha256: str) -> None:
        """Remove the blob and its cached copy, if there is one."""
        self._cached(sha256).unlink(missing_ok=True)
        try:
            self._fs.rm_file(self._key(sha256))
        except FileNotFoundError:
            return

    def list(self) -> list[str]:
        """The SHA-256 of every blob."""
        return sorted(blob.sha256 for blob in self.blobs())

    def blobs(self) -> Iterator[Blob]:
        """All blobs, for garbage collection."""
        files = self._fs.find(self._root, detail=True) if self._fs.exists(self._root) else {}
        for path, facts in files.items():
            name = str(path).rsplit("/", 1)[-1]
            if _SHA256.fullmatch(name):
                yield Blob(name, int(facts["size"]), self._stored_at(str(path), facts))

    def abandoned(self, before: datetime) -> Iterator[Path]:
        """Temporary files on this machine that were last written before then."""
        yield from _older((self._cache / "tmp").iterdir(), before)

    def cached(self, before: datetime) -> Iterator[Path]:
        """This machine's copies, made before then, of a remote store's blobs; a local store has none."""
        if not self._is_local:
            yield from _older((path for path in self._cache.glob("??/*") if _SHA256.fullmatch(path.name)), before)

    def _stored_at(self, path: str, facts: dict[str, Any]) -> datetime:
        """When the blob was last stored, in whichever form the store reports it."""
        stored = facts.get("mtime") or facts.get("LastModified") or self._fs.modified(path)
        return datetime.fromtimestamp(stored, UTC) if isinstance(stored, int | float) else stored.astimezone(UTC)

    def _is_fresh(self, sha256: str, size: int) -> bool:
        """Whether the complete blob was stored recently, so that garbage collection won't remove it."""
        try:
            facts = self._fs.info(self._key(sha256))
        except FileNotFoundError:
            return False
        return facts["size"] == size and datetime.now(UTC) - self._stored_at(self._key(sha256), facts) < _FRESH

    def _key(self, sha256: str) -> str:
        return f"{self._root}/{_relative_path(sha256)}"

    def _cached(self, sha256: str) -> Path:
        return self._cache / _relative_path(sha256)

    def _adopt(self, temporary: Path, sha256: str) -> None:
        if self._is_local:
            _publish(temporary, Path(self._key(sha256)))
        elif not self._is_fresh(sha256, temporary.stat().st_size):  # object stores publish only complete objects
            self._fs.makedirs(f"{self._root}/{sha256[:2]}", exist_ok=True)
            self._fs.put_file(str(temporary), self._key(sha256))


def _older(paths: Iterable[Path], before: datetime) -> Iterator[Path]:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if datetime.fromtimestamp(path.stat().st_mtime, UTC) < before:
                yield path


def _relative_path(sha256: str) -> str:
    """The path of a blob below the root. Only a hash ever becomes a path."""
    if not _SHA256.fullmatch(sha256):
        raise NotFound(f"{sha256[:80]!r} is not a SHA-256 in lower-case hex.")
    return f"{sha256[:2]}/{sha256}"


def _missing(sha256: str) -> NotFound:
    return NotFound(f"There is no blob {sha256}.")


def _publish(temporary: Path, path: Path) -> None:
    """Make the file durable, then publish it under its name atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.chmod(0o400)
    os.replace(temporary, path)


def _copy_and_hash(source: Path | bytes | IO[bytes], target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as output:
        for chunk in _source_chunks(source):
            digest.update(chunk)
            output.write(chunk)
    return digest.hexdigest()


def _source_chunks(source: Path | bytes | IO[bytes]) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
    elif isinstance(source, Path):
        with source.open("rb") as stream:
            yield from _source_chunks(stream)
    else:
        while chunk := source.read(CHUNK_BYTES):
            yield chunk


def _chunks(stream: Any, start: int, stop: int | None) -> Iterator[bytes]:
    with stream:
        stream.seek(start)
        remaining = None if stop is None else stop - start
        while remaining is None or remaining > 0:
            chunk = stream.read(CHUNK_BYTES if remaining is None else min(CHUNK_BYTES, remaining))
            if not chunk:
                return
            if remaining is not None:
                remaining -= len(chunk)
            yield chunk


def copy_to(store: BlobStore, sha256: str, path: Path) -> None:
    """Put a blob at a path, as a hard link if the file system allows it, else as a copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = store.local_path(sha256)
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
