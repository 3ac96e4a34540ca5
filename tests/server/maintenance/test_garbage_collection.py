"""Garbage collection removes what nothing refers to and keeps the rest, also while the server works."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, update

from post_server.auth.audit_log import lines
from post_server.db.tables import Base, IdempotencyRow, JobRow, PromptRow, UploadRow, now
from post_server.jobs import states
from post_server.maintenance import garbage_collection
from post_server.maintenance.garbage_collection import collect_garbage
from post_server.models.service import add_model
from post_server.prompts.service import add_prompt, delete_prompt
from post_server.settings import Settings, get_settings
from post_server.storage.blob_references import blobs_in_use
from post_server.storage.blob_store import BlobStore
from post_server.worker.supervisor import work_folder
from post_shared.errors import Conflict, NotFound, WorkerLost
from post_shared.schemas.jobs import JobKind, JobState
from post_shared.schemas.models import ModelRole
from post_shared.schemas.prompts import PromptRole
from tests.server.http_harness import HttpHarness, prompt_bytes
from tests.server.server_harness import ServerHarness
from tests.server.terminal import run

NOW, DAY = timedelta(0), timedelta(days=1)


def collect(harness: ServerHarness | HttpHarness, grace: timedelta = NOW, *, dry_run: bool = False) -> dict[str, int]:
    removed = collect_garbage(harness.database, harness.store, harness.settings, grace=grace, dry_run=dry_run)
    return {each.what: each.count for each in removed}


@pytest.fixture
def filled(http_harness: HttpHarness) -> HttpHarness:
    """A model, a student, a dataset and a prompt; two unreferenced blobs."""
    _, student = http_harness.add_pair()
    http_harness.add_dataset()
    http_harness.push("alice", prompt_bytes(student.hash))
    for data in (b"of a model that was never added", b"of another"):
        http_harness.store.put(data)
    return http_harness


def test_referenced_blobs_stay_and_the_others_are_removed(filled: HttpHarness) -> None:
    with filled.database.read() as session:
        used = blobs_in_use(session)
    assert len(filled.store.list()) == len(used) + 2
    assert collect(filled, dry_run=True)["unreferenced blobs"] == 2
    assert len(filled.store.list()) == len(used) + 2, "a dry run removes nothing"
    assert collect(filled)["unreferenced blobs"] == 2
    assert filled.store.list() == sorted(used)
    assert all(filled.store.read(each) for each in used)
    assert collect(filled)["unreferenced blobs"] == 0


def test_new_blobs_stay(filled: HttpHarness) -> None:
    before = filled.store.list()
    assert not any(collect(filled, DAY).values())
    assert filled.store.list() == before


def test_every_column_that_names_blobs_is_known() -> None:
    """A new column has to be added to those that blobs_in_use reads."""
    names = {"sha256", "files", "parts"}
    columns = {f"{table.name}.{column.name}" for table in Base.metadata.sorted_tables for column in table.columns}
    assert {each for each in columns if each.split(".")[1] in names or "blob" in each} == {
        "prompts.sha256",
        "datasets.sha256",
        "models.files",
        "uploads.parts",
    }


def test_parts_of_an_upload_stay_for_a_day(http_harness: HttpHarness) -> None:
    """Then the upload is removed with its bytes."""
    body = {"name": "parts", "kind": "rows"}
    upload = http_harness("provider", "POST", "/v1/uploads", json=body).json()["id"]
    http_harness("provider", "PUT", f"/v1/uploads/{upload}/parts/1", content=b'{"text": "x"}\n')
    assert len(http_harness.store.list()) == 1
    assert not any(collect(http_harness).values())
    with http_harness.database.write() as session:
        session.execute(update(UploadRow).values(created_at=now() - 2 * DAY))
    assert collect(http_harness, dry_run=True)["abandoned dataset uploads"] == 1
    assert len(http_harness.store.list()) == 1
    assert collect(http_harness)["abandoned dataset uploads"] == 1
    assert http_harness.store.list() == []


def test_bytes_stay_while_a_prompt_names_them(http_harness: HttpHarness) -> None:
    """Deleting a prompt keeps the blob that another row names."""
    _, student = http_harness.add_pair()
    data = prompt_bytes(student.hash)
    mine, theirs = (http_harness.push(who, data).json() for who in ("alice", "bob"))
    http_harness("alice", "DELETE", f"/v1/prompts/{mine['id']}")
    collect(http_harness)
    assert http_harness.store.read(theirs["sha256"]) == data


def test_a_model_is_complete_if_its_old_blobs_are_removed_while_it_is_added(
    server_harness: ServerHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage is collected without any grace after a file is stored and before the row is added."""
    model = server_harness.add_target()
    facts = {name: getattr(model, name) for name in ("kind", "architecture", "layers", "hidden_size")}
    (tmp_path / "config.json").write_text('{"model_type": "llama", "new": 1}')
    put, removed = server_harness.store.put, []

    def put_and_collect(source: Path) -> str:
        sha256 = put(source)
        if not removed:
            removed.append(sha256)
            collect(server_harness)
            assert not server_harness.store.exists(sha256)
        return sha256

    (tmp_path / "model.safetensors").write_bytes(server_harness.store.read(_weights(server_harness)))
    monkeypatch.setattr(server_harness.store, "put", put_and_collect)
    with server_harness.database.write() as session:
        row = add_model(
            session,
            server_harness.store,
            tmp_path,
            name="new",
            role=ModelRole.TARGET,
            vocabulary=9,
            parameters=9,
            **facts,
        )
    assert removed
    assert all(server_harness.store.exists(file["sha256"]) for file in row.files)


def _weights(server_harness: ServerHarness) -> str:
    from post_server.models.service import find_model, model_files

    with server_harness.database.read() as session:
        return next(
            file.sha256 for file in model_files(find_model(session, "target")) if file.path.endswith(".safetensors")
        )


def test_prompts_added_and_deleted_during_collection_lose_nothing(http_harness: HttpHarness) -> None:
    """Without any grace: the guard alone protects them."""
    _, student = http_harness.add_pair()
    stop = threading.Event()

    def add_and_delete(seed: int) -> None:
        for step in range(13):
            data = prompt_bytes(student.hash, seed=seed * 2 + step % 2)
            with http_harness.database.write() as session:
                owner = http_harness.key_ids["alice"]
                row, _ = add_prompt(session, http_harness.store, data, role=PromptRole.SOURCE, owner_key_id=owner)
            if step % 3:
                with http_harness.database.write() as session:
                    if (again := session.get(PromptRow, row.id)) is not None:
                        delete_prompt(session, http_harness.store, again)

    def collect_continuously() -> None:
        while not stop.is_set():
            collect(http_harness)

    collector = threading.Thread(target=collect_continuously)
    workers = [threading.Thread(target=add_and_delete, args=(seed,)) for seed in range(3)]
    for thread in (collector, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    collector.join()
    with http_harness.database.read() as session:
        rows = session.scalars(select(PromptRow)).all()
        assert rows
        assert all(http_harness.store.exists(row.sha256) for row in rows)


def test_temporary_files_of_abandoned_uploads(http_harness: HttpHarness) -> None:
    old, young = http_harness.store.new_file(), http_harness.store.new_file()
    os.utime(old, (0, 0))
    assert collect(http_harness, DAY)["temporary files"] == 1
    assert not old.exists()
    assert young.exists()
    young.unlink()


def test_cached_copies_of_unreferenced_remote_blobs(tmp_path: Path, server_harness: ServerHarness) -> None:
    store = BlobStore("memory://clean-up", cache=tmp_path / "cache")
    path, young = (store.local_path(store.put(each)) for each in (b"a copy", b"one that a worker has just made"))
    os.utime(path, (0, 0))
    removed = collect_garbage(server_harness.database, store, server_harness.settings, grace=DAY)
    assert {each.what: each.count for each in removed}["cached copies"] == 1
    assert not path.exists()
    assert young.exists()
    assert store.list(), "its blob is too new to be removed"


def test_folders_of_ended_jobs_and_expired_answers(server_harness: ServerHarness) -> None:
    running, ended = (server_harness.add_job(JobKind.TRANSFER, {}) for _ in range(2))
    for job_id in (running, ended):
        (work_folder(server_harness.settings, job_id) / "checkpoint").mkdir(parents=True)
    with server_harness.database.write() as session:
        states.request_cancel(session, ended)
        for key, days in (("old", 2), ("new", 0)):
            at = now() - days * DAY
            member = {"key_id": server_harness.owner.id, "key": key, "body_hash": "x", "status": 201}
            session.add(IdempotencyRow(**member, response={}, created_at=at))
    assert collect(server_harness, dry_run=True)["work folders of ended jobs"] == 1
    removed = collect(server_harness)
    assert (removed["work folders of ended jobs"], removed["expired idempotent answers"]) == (1, 1)
    assert work_folder(server_harness.settings, running).exists()
    assert not work_folder(server_harness.settings, ended).exists()
    with server_harness.database.read() as session:
        assert [row.key for row in session.scalars(select(IdempotencyRow))] == ["new"]


def test_the_folder_of_a_job_that_is_requeued_meanwhile_stays(
    server_harness: ServerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = server_harness.add_job(JobKind.TRANSFER, {})
    folder = work_folder(server_harness.settings, job_id)
    folder.mkdir(parents=True)
    with server_harness.database.write() as session:
        states.request_cancel(session, job_id)

    def requeue(path: Path) -> int:
        with server_harness.database.write() as session:
            states.requeue(session, job_id)
        return 0

    monkeypatch.setattr(garbage_collection, "_size", requeue)
    collect(server_harness)
    assert folder.exists()


def test_a_file_that_another_run_removed_is_no_error(
    http_harness: HttpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = http_harness.store.new_file()
    missing.unlink()
    monkeypatch.setattr(BlobStore, "abandoned", lambda self, before: iter([missing]))
    assert collect(http_harness)["temporary files"] == 1


# --- jobs ---------------------------------------------------------------------------------------------


def test_a_failed_job_starts_again(server_harness: ServerHarness) -> None:
    job_id = server_harness.add_job(JobKind.TRANSFER, {})
    with server_harness.database.write() as session:
        row, lease = states.claim(session, job_id, lease_seconds=60, max_attempts=3) or pytest.fail("not claimed")
        with pytest.raises(Conflict, match="running"):
            states.requeue(session, job_id)
        states.fail(session, lease, WorkerLost("gone"))
        states.requeue(session, job_id)
    row = server_harness.job(job_id)
    assert (row.state, row.attempt, row.error, row.finished_at) == (JobState.QUEUED, 0, None, None)
    assert server_harness.events(job_id)[-1].data["reason"] == "requeued"
    with server_harness.database.write() as session:
        assert states.claim(session, job_id, lease_seconds=60, max_attempts=1) is not None
        with pytest.raises(NotFound):
            states.requeue(session, "job_unknown")
    assert server_harness.job(job_id).attempt == 1


@pytest.fixture
def settings(http_harness: HttpHarness, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """The commands act on the database and store of ``http_harness``."""
    for name in ("home", "database_url", "redis_url", "storage_url"):
        monkeypatch.setenv(f"POST_{name.upper()}", str(getattr(http_harness.settings, name)))
    get_settings.cache_clear()
    yield get_settings()
    get_settings.cache_clear()


def test_the_commands(filled: HttpHarness, settings: Settings) -> None:
    row = JobRow(kind=JobKind.DISTIL, request={}, owner_key_id=filled.key_ids["provider"])
    with filled.database.write() as session:
        states.announce(session, row)
    assert "queued" in run("admin", "jobs", "--state", "queued", "--key", filled.key_ids["provider"])
    assert row.id not in run("admin", "jobs", "--key", filled.key_ids["alice"])
    assert run("admin", "cancel", row.id).strip() == f"{row.id}: cancelled"
    assert run("admin", "requeue", row.id).strip() == f"{row.id}: queued"
    assert run("admin", "priority", row.id, "7").strip() == f"{row.id}: priority 7"
    assert filled.job(row.id).priority == 7
    with filled.database.write() as session:
        session.execute(update(JobRow).values(state=JobState.SUCCEEDED))
    for refused in (("requeue", row.id), ("priority", row.id, "1")):
        with pytest.raises(Conflict):
            run("admin", *refused)
    blobs = filled.store.list()
    assert "would be removed" in run("admin", "collect-garbage", "--dry-run", "--grace-hours", "0")
    assert filled.store.list() == blobs
    run("admin", "collect-garbage", "--grace-hours", "0")
    assert len(filled.store.list()) == len(blobs) - 2
    with filled.database.read() as session:
        done = [line.action for line in lines(session) if line.who.startswith("local:")]
    assert done == ["storage.collect_garbage", "job.priority", "job.requeue", "job.cancel"]
