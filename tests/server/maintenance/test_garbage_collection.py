"""Clean-up takes what nothing names and leaves all that anything names, whatever else happens meanwhile."""

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
from post_server.maintenance import garbage_collection as cleaning
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


def cleaned(stage: ServerHarness | HttpHarness, grace: timedelta = NOW, *, dry_run: bool = False) -> dict[str, int]:
    found = collect_garbage(stage.database, stage.store, stage.settings, grace=grace, dry_run=dry_run)
    return {each.what: each.count for each in found}


@pytest.fixture
def filled(http_harness: HttpHarness) -> HttpHarness:
    """A model, a student, a dataset and a prompt; two blobs that nothing names."""
    _, student = http_harness.add_pair()
    http_harness.add_dataset()
    http_harness.push("alice", prompt_bytes(student.hash))
    for data in (b"of a model that was never added", b"of another"):
        http_harness.store.put(data)
    return http_harness


def test_what_is_named_stays_and_the_rest_goes(filled: HttpHarness) -> None:
    with filled.database.read() as session:
        used = blobs_in_use(session)
    assert len(filled.store.list()) == len(used) + 2
    assert cleaned(filled, dry_run=True)["blobs that nothing names"] == 2
    assert len(filled.store.list()) == len(used) + 2, "a dry run removes nothing"
    assert cleaned(filled)["blobs that nothing names"] == 2
    assert filled.store.list() == sorted(used)
    assert all(filled.store.read(each) for each in used)
    assert cleaned(filled)["blobs that nothing names"] == 0


def test_what_is_young_stays(filled: HttpHarness) -> None:
    before = filled.store.list()
    assert not any(cleaned(filled, DAY).values())
    assert filled.store.list() == before


def test_every_column_that_names_blobs_is_known() -> None:
    """A new one has to be added to the two that blob_names looks at."""
    names = {"sha256", "files", "parts"}
    found = {f"{table.name}.{column.name}" for table in Base.metadata.sorted_tables for column in table.columns}
    assert {each for each in found if each.split(".")[1] in names or "blob" in each} == {
        "prompts.sha256",
        "datasets.sha256",
        "models.files",
        "uploads.parts",
    }


def test_parts_of_an_upload_stay_for_its_day(http_harness: HttpHarness) -> None:
    """Then it is forgotten, with its bytes."""
    order = {"name": "parts", "kind": "rows"}
    upload = http_harness("provider", "POST", "/v1/uploads", json=order).json()["id"]
    http_harness("provider", "PUT", f"/v1/uploads/{upload}/parts/1", content=b'{"text": "x"}\n')
    assert len(http_harness.store.list()) == 1
    assert not any(cleaned(http_harness).values())
    with http_harness.database.write() as session:
        session.execute(update(UploadRow).values(created_at=now() - 2 * DAY))
    assert cleaned(http_harness, dry_run=True)["forgotten uploads of datasets"] == 1
    assert len(http_harness.store.list()) == 1
    assert cleaned(http_harness)["forgotten uploads of datasets"] == 1
    assert http_harness.store.list() == []


def test_the_last_prompt_with_the_bytes_keeps_them(http_harness: HttpHarness) -> None:
    """Deleted prompts leave no blob that another row names."""
    _, student = http_harness.add_pair()
    data = prompt_bytes(student.hash)
    mine, theirs = (http_harness.push(who, data).json() for who in ("alice", "bob"))
    http_harness("alice", "DELETE", f"/v1/prompts/{mine['id']}")
    cleaned(http_harness)
    assert http_harness.store.read(theirs["sha256"]) == data


def test_a_model_whose_old_blobs_are_cleaned_while_it_is_added_is_whole(
    server_harness: ServerHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the storing of its files and its row comes a clean-up without any grace."""
    model = server_harness.add_target()
    facts = {name: getattr(model, name) for name in ("kind", "architecture", "layers", "hidden_size")}
    (tmp_path / "config.json").write_text('{"model_type": "llama", "new": 1}')
    put, last = server_harness.store.put, []

    def put_and_clean(source: Path) -> str:
        sha256 = put(source)
        if not last:
            last.append(sha256)
            cleaned(server_harness)
            assert not server_harness.store.exists(sha256)
        return sha256

    (tmp_path / "model.safetensors").write_bytes(server_harness.store.read(_weights(server_harness)))
    monkeypatch.setattr(server_harness.store, "put", put_and_clean)
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
    assert last
    assert all(server_harness.store.exists(file["sha256"]) for file in row.files)


def _weights(server_harness: ServerHarness) -> str:
    from post_server.models.service import find_model, model_files

    with server_harness.database.read() as session:
        return next(
            file.sha256 for file in model_files(find_model(session, "target")) if file.path.endswith(".safetensors")
        )


def test_prompts_that_come_and_go_beside_a_clean_up_lose_nothing(http_harness: HttpHarness) -> None:
    """With no grace at all: the guard alone has to do."""
    _, student = http_harness.add_pair()
    stop = threading.Event()

    def come_and_go(seed: int) -> None:
        for step in range(13):
            data = prompt_bytes(student.hash, seed=seed * 2 + step % 2)
            with http_harness.database.write() as session:
                owner = http_harness.key_ids["alice"]
                row, _ = add_prompt(session, http_harness.store, data, role=PromptRole.SOURCE, owner_key_id=owner)
            if step % 3:
                with http_harness.database.write() as session:
                    if (again := session.get(PromptRow, row.id)) is not None:
                        delete_prompt(session, http_harness.store, again)

    def clean_all_the_time() -> None:
        while not stop.is_set():
            cleaned(http_harness)

    cleaner = threading.Thread(target=clean_all_the_time)
    workers = [threading.Thread(target=come_and_go, args=(seed,)) for seed in range(3)]
    for thread in (cleaner, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    cleaner.join()
    with http_harness.database.read() as session:
        rows = session.scalars(select(PromptRow)).all()
        assert rows
        assert all(http_harness.store.exists(row.sha256) for row in rows)


def test_files_of_uploads_that_were_given_up(http_harness: HttpHarness) -> None:
    old, young = http_harness.store.new_file(), http_harness.store.new_file()
    os.utime(old, (0, 0))
    assert cleaned(http_harness, DAY)["temporary files"] == 1
    assert not old.exists()
    assert young.exists()
    young.unlink()


def test_copies_of_remote_blobs_that_nothing_names(tmp_path: Path, server_harness: ServerHarness) -> None:
    store = BlobStore("memory://clean-up", cache=tmp_path / "cache")
    path, young = (store.local_path(store.put(each)) for each in (b"a copy", b"one that a worker has just made"))
    os.utime(path, (0, 0))
    found = collect_garbage(server_harness.database, store, server_harness.settings, grace=DAY)
    assert {each.what: each.count for each in found}["cached copies"] == 1
    assert not path.exists()
    assert young.exists()
    assert store.list(), "its blob is too young to go"


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
    assert cleaned(server_harness, dry_run=True)["work folders of ended jobs"] == 1
    found = cleaned(server_harness)
    assert (found["work folders of ended jobs"], found["expired idempotent answers"]) == (1, 1)
    assert work_folder(server_harness.settings, running).exists()
    assert not work_folder(server_harness.settings, ended).exists()
    with server_harness.database.read() as session:
        assert [row.key for row in session.scalars(select(IdempotencyRow))] == ["new"]


def test_the_folder_of_a_job_that_is_ordered_again_meanwhile_stays(
    server_harness: ServerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = server_harness.add_job(JobKind.TRANSFER, {})
    folder = work_folder(server_harness.settings, job_id)
    folder.mkdir(parents=True)
    with server_harness.database.write() as session:
        states.request_cancel(session, job_id)

    def again(path: Path) -> int:
        with server_harness.database.write() as session:
            states.requeue(session, job_id)
        return 0

    monkeypatch.setattr(cleaning, "_size", again)
    cleaned(server_harness)
    assert folder.exists()


def test_a_file_that_another_clean_up_took_is_no_defect(
    http_harness: HttpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = http_harness.store.new_file()
    gone.unlink()
    monkeypatch.setattr(BlobStore, "abandoned", lambda self, before: iter([gone]))
    assert cleaned(http_harness)["temporary files"] == 1


# --- jobs ---------------------------------------------------------------------------------------------


def test_a_job_that_failed_begins_anew(server_harness: ServerHarness) -> None:
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
    """The commands act on the store of ``front``."""
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
    assert "would go" in run("admin", "collect-garbage", "--dry-run", "--grace-hours", "0")
    assert filled.store.list() == blobs
    run("admin", "collect-garbage", "--grace-hours", "0")
    assert len(filled.store.list()) == len(blobs) - 2
    with filled.database.read() as session:
        done = [line.action for line in lines(session) if line.who.startswith("local:")]
    assert done == ["storage.collect_garbage", "job.priority", "job.requeue", "job.cancel"]
