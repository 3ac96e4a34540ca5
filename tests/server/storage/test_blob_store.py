"""One contract for all blob stores."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from post_server.storage.blob_store import BlobStore, copy_to
from post_shared.errors import IntegrityError, NotFound
from tests.server.external_services import ObjectStore

DATA = bytes(range(256)) * 40
SHA256 = hashlib.sha256(DATA).hexdigest()
_PUT = """
import sys
from pathlib import Path
from post_server.storage.blob_store import BlobStore
BlobStore(sys.argv[1], cache=Path(sys.argv[2])).put(sys.stdin.buffer.read())
"""


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    urls = {"file": lambda: f"file://{tmp_path}/blobs", "memory": lambda: f"memory://{secrets.token_hex(8)}"}
    urls["s3"] = lambda: request.getfixturevalue("object_store").new_bucket()
    return BlobStore(urls[request.param](), cache=tmp_path / "cache")


class TestContract:
    """The same behaviour in a folder and in an object store."""

    def test_bytes_are_returned_unchanged(self, store: BlobStore) -> None:
        assert store.put(DATA) == SHA256
        assert store.read(SHA256) == DATA
        assert store.exists(SHA256)
        assert store.size(SHA256) == len(DATA)
        assert store.local_path(SHA256).read_bytes() == DATA

    def test_the_name_depends_on_the_bytes_alone(self, store: BlobStore, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(DATA)
        assert store.put(tmp_path / "source") == store.put(io.BytesIO(DATA)) == store.put(DATA) == SHA256
        assert store.list() == [SHA256]

    def test_a_file_can_be_adopted(self, store: BlobStore) -> None:
        temporary = store.new_file()
        temporary.write_bytes(DATA)
        store.adopt(temporary, SHA256)
        assert not temporary.exists()
        assert store.read(SHA256) == DATA

    @pytest.mark.parametrize(("start", "stop"), [(0, 10), (5, None), (100, 101), (0, 0), (10_000, 99_999)])
    def test_a_part_is_a_slice(self, store: BlobStore, start: int, stop: int | None) -> None:
        store.put(DATA)
        assert b"".join(store.open(SHA256, start, stop)) == DATA[start:stop]

    def test_no_temporary_file_stays(self, store: BlobStore, tmp_path: Path) -> None:
        store.put(DATA)
        store.local_path(SHA256)
        assert not list(tmp_path.rglob("tmp/*"))

    def test_a_missing_blob_is_not_found(self, store: BlobStore) -> None:
        assert not store.exists(SHA256)
        for read in (store.open, store.size, store.local_path, store.read):
            with pytest.raises(NotFound):
                read(SHA256)
        store.delete(SHA256)

    @pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 64, f"{SHA256}/x", f"{SHA256}\n"])
    def test_only_a_hash_is_a_name(self, store: BlobStore, name: str) -> None:
        for method in (store.open, store.local_path, store.delete, store.exists):
            with pytest.raises(NotFound):
                method(name)

    def test_deleted_is_gone(self, store: BlobStore) -> None:
        store.put(DATA)
        store.local_path(SHA256)
        store.delete(SHA256)
        assert not store.exists(SHA256)
        assert store.list() == []
        with pytest.raises(NotFound):
            store.local_path(SHA256)

    def test_one_blob_can_have_many_writers(self, store: BlobStore) -> None:
        writers = [threading.Thread(target=store.put, args=(DATA,)) for _ in range(8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert store.read(SHA256) == DATA

    def test_deleting_a_copy_keeps_the_blob(self, store: BlobStore, tmp_path: Path) -> None:
        store.put(DATA)
        copy_to(store, SHA256, tmp_path / "model" / "weights")
        assert (tmp_path / "model" / "weights").read_bytes() == DATA
        (tmp_path / "model" / "weights").unlink()
        assert store.read(SHA256) == DATA


def test_another_process_sees_every_change_at_once(object_store: ObjectStore, tmp_path: Path) -> None:
    """Two hosts, one bucket: listings aren't cached."""
    url = object_store.new_bucket()
    here, there = (BlobStore(url, cache=tmp_path / name) for name in ("here", "there"))
    assert not here.list()
    assert not here.exists(SHA256)
    subprocess.run([sys.executable, "-c", _PUT, url, str(tmp_path / "other")], input=DATA, check=True)
    assert here.list() == [SHA256]
    assert here.read(SHA256) == DATA
    there.delete(SHA256)
    assert not here.exists(SHA256)


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    store = BlobStore(f"file://{tmp_path}")
    store.put(DATA)
    old, new = store.new_file(), store.new_file()
    os.utime(old, (0, 0))
    store.sweep()
    assert (old.exists(), new.exists()) == (False, True)
    assert store.list() == [SHA256]


def test_changed_bytes_are_detected(tmp_path: Path) -> None:
    store = BlobStore(f"file://{tmp_path}")
    path = store.local_path(store.put(DATA))
    path.chmod(0o600)
    path.write_bytes(DATA[:-1])
    with pytest.raises(IntegrityError):
        store.read(SHA256)


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell():
                raise OSError("cable pulled")
            return super().read(10)

    store = BlobStore(f"file://{tmp_path}")
    with pytest.raises(OSError, match="cable"):
        store.put(Broken(DATA))
    assert store.list() == []
    assert not list((tmp_path / "tmp").iterdir())


def test_an_early_upload_is_adopted_without_another_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(f"memory://{secrets.token_hex(8)}", cache=tmp_path / "cache")
    file = store.new_file()
    file.write_bytes(DATA)
    store.upload_early(file, SHA256)
    uploads: list[str] = []
    monkeypatch.setattr(store._fs, "put_file", lambda source, target: uploads.append(target))
    assert store.adopt(file, SHA256) == SHA256
    assert (uploads, store.read(SHA256), file.exists()) == ([], DATA, False)


def test_a_deleted_early_upload_is_uploaded_again(tmp_path: Path) -> None:
    store = BlobStore(f"memory://{secrets.token_hex(8)}", cache=tmp_path / "cache")
    file = store.new_file()
    file.write_bytes(DATA)
    store.upload_early(file, SHA256)
    store.delete(SHA256)
    store.adopt(file, SHA256)
    assert store.read(SHA256) == DATA


def test_a_partial_blob_is_uploaded_again(tmp_path: Path) -> None:
    """A remote store that isn't an object store may keep a partial file."""
    store = BlobStore(f"memory://{secrets.token_hex(8)}", cache=tmp_path / "cache")
    store._fs.pipe_file(store._key(SHA256), DATA[:5])
    store.put(DATA)
    assert store.read(SHA256) == DATA


def test_a_folder_needs_no_early_upload(tmp_path: Path) -> None:
    store = BlobStore(f"file://{tmp_path}")
    file = store.new_file()
    file.write_bytes(DATA)
    store.upload_early(file, SHA256)
    assert (store.list(), file.read_bytes()) == ([], DATA)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_storing_a_blob_again_renews_its_time(tmp_path: Path, kind: str) -> None:
    """So garbage collection, which removes old blobs, keeps one whose row is about to be added."""
    old = datetime.now(UTC) - timedelta(days=30)
    url = f"file://{tmp_path}/blobs" if kind == "file" else f"memory://{secrets.token_hex(8)}"
    store = BlobStore(url, cache=tmp_path / "cache")
    store.put(DATA)
    if kind == "file":
        os.utime(store.local_path(SHA256), (old.timestamp(), old.timestamp()))
    else:
        store._fs.store[store._key(SHA256)].modified = old
    (blob,) = store.blobs()
    assert (blob.sha256, blob.size) == (SHA256, len(DATA))
    assert abs(blob.stored_at - old) < timedelta(seconds=2)
    store.put(DATA)
    (blob,) = store.blobs()
    assert datetime.now(UTC) - blob.stored_at < timedelta(minutes=1)
