"""Uploads in parts are complete or refused, resumable, limited in size, and leave nothing behind."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from post_client import Client
from post_server.auth.keys import create_key
from post_server.datasets import upload_endpoints
from post_server.datasets.uploads import LIFETIME
from post_server.db import database
from post_server.db.tables import UploadRow, now
from post_server.http.idempotency import Once
from post_server.maintenance.garbage_collection import collect_garbage
from post_server.storage.blob_store import BlobStore
from post_shared.errors import Conflict, DataInvalid, InvalidInput, NotFound, Unavailable
from post_shared.schemas.common import Role
from tests.server.http_harness import ROWS, HttpHarness, code, prompt_bytes

PARTS = (ROWS[:20], ROWS[20:50], ROWS[50:])
REQUEST = {"name": "public", "kind": "rows", "licence": "MIT"}


@pytest.fixture
def upload(http_harness: HttpHarness) -> str:
    return str(http_harness("provider", "POST", "/v1/uploads", json=REQUEST).json()["id"])


def put(http_harness: HttpHarness, upload: str, number: int, content: bytes) -> httpx.Response:
    return http_harness("provider", "PUT", f"/v1/uploads/{upload}/parts/{number}", content=content)


def finish(http_harness: HttpHarness, upload: str, **body: str) -> httpx.Response:
    return http_harness("provider", "POST", f"/v1/uploads/{upload}/finish", json=body)


def test_parts_in_any_order_make_the_dataset(http_harness: HttpHarness, upload: str) -> None:
    for number in (3, 1, 2):
        assert put(http_harness, upload, number, PARTS[number - 1]).status_code == 200
    shown = http_harness("provider", "GET", f"/v1/uploads/{upload}").json()
    assert [part["sha256"] for part in shown["parts"]] == [hashlib.sha256(part).hexdigest() for part in PARTS]
    assert [item["id"] for item in http_harness("provider", "GET", "/v1/uploads").json()["items"]] == [upload]
    created = finish(http_harness, upload, sha256=hashlib.sha256(ROWS).hexdigest())
    assert created.status_code == 201
    assert created.json().items() >= {**REQUEST, "rows": 2, "labels": ["negative", "positive"]}.items()
    assert http_harness.store.read(created.json()["sha256"]) == ROWS
    assert http_harness.store.list() == [created.json()["sha256"]]  # the parts are gone
    assert code(http_harness("provider", "GET", f"/v1/uploads/{upload}")) == (404, "not_found")


def test_an_upload_is_finished_without_a_body(http_harness: HttpHarness, upload: str) -> None:
    for number in (1, 2, 3):
        put(http_harness, upload, number, PARTS[number - 1])
    created = http_harness("provider", "POST", f"/v1/uploads/{upload}/finish")
    assert created.status_code == 201
    assert http_harness.store.read(created.json()["sha256"]) == ROWS


def test_bytes_are_uploaded_before_other_writers_are_blocked(
    http_harness: HttpHarness, upload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    upload_early, adopt, lock = BlobStore.upload_early, BlobStore.adopt, database._lock
    monkeypatch.setattr(BlobStore, "upload_early", lambda *args: (calls.append("upload"), upload_early(*args))[1])
    monkeypatch.setattr(BlobStore, "adopt", lambda *args: (calls.append("adopt"), adopt(*args))[1])
    monkeypatch.setattr(database, "_lock", lambda *args: (calls.append("lock"), lock(*args))[1])
    request: Any = {
        "params": {"name": "whole", "kind": "rows"},
        "content": ROWS + b'{"text": "x", "label": "negative"}',
    }
    for send in (
        lambda: put(http_harness, upload, 1, ROWS),
        lambda: finish(http_harness, upload),
        lambda: http_harness("provider", "POST", "/v1/datasets", **request),
    ):
        calls.clear()
        assert send().status_code in (200, 201)
        assert calls[0] == "upload"
        assert calls.index("lock") < calls.index("adopt")


def test_a_store_that_fails_to_delete_does_not_fail_an_upload(
    http_harness: HttpHarness, upload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dataset is committed before its parts are deleted; garbage collection removes the rest."""

    def fails(self: BlobStore, sha256: str) -> None:
        raise PermissionError("no")

    put(http_harness, upload, 1, PARTS[0])
    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "delete", fails)
        for number in (1, 2, 3):
            assert put(http_harness, upload, number, PARTS[number - 1]).status_code == 200
        created = finish(http_harness, upload)
        assert created.status_code == 201
    assert http_harness.store.read(created.json()["sha256"]) == ROWS
    assert len(http_harness.store.list()) == 4
    collect_garbage(http_harness.database, http_harness.store, http_harness.settings, grace=timedelta(0))
    assert http_harness.store.list() == [created.json()["sha256"]]


def test_a_failed_transaction_deletes_no_bytes(
    http_harness: HttpHarness, upload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(http_harness, upload, 1, ROWS + b'{"text": "x", "label": "negative"}')

    def fails(*args: object) -> None:
        raise OperationalError("COMMIT", {}, Exception("connection lost"))

    with monkeypatch.context() as patch:
        patch.setattr(Once, "_store", fails)
        headers = {"Idempotency-Key": "k"}
        lost = http_harness("provider", "POST", f"/v1/uploads/{upload}/finish", json={}, headers=headers)
        assert code(lost) == (503, "unavailable")
    assert finish(http_harness, upload).status_code == 201


def test_parts_may_be_sent_concurrently_and_reading_does_not_wait(
    http_harness: HttpHarness, upload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storing, resume, adopt = threading.Event(), threading.Event(), BlobStore.adopt

    def slowly(*arguments: object) -> str:
        storing.set()
        resume.wait(10)
        return adopt(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(BlobStore, "adopt", slowly)
    headers = {"Authorization": f"Bearer {http_harness.keys['provider']}"}

    def send(number: int) -> int:
        url = f"{http_harness.url}/v1/uploads/{upload}/parts/{number}"
        return httpx.put(url, content=PARTS[number - 1], headers=headers, timeout=30, trust_env=False).status_code

    with ThreadPoolExecutor() as executor:
        responses = [executor.submit(send, number) for number in (1, 2, 3)]
        assert storing.wait(10)
        try:
            assert http_harness("provider", "GET", f"/v1/uploads/{upload}").json()["parts"] == []
        finally:
            resume.set()
    assert [response.result() for response in responses] == [200, 200, 200]
    assert finish(http_harness, upload, sha256=hashlib.sha256(ROWS).hexdigest()).status_code == 201


def test_a_finish_overtaken_by_another_process_gets_the_same_response(
    http_harness: HttpHarness, upload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, part in enumerate(PARTS, 1):
        put(http_harness, upload, number, part)
    key, join = {"Idempotency-Key": "0b1e7ad4"}, upload_endpoints.join_parts
    other = http_harness.twin()
    answers: list[httpx.Response] = []

    def overtaken(*arguments: object) -> None:
        if not answers:
            monkeypatch.undo()
            answers.append(other("provider", "POST", f"/v1/uploads/{upload}/finish", json={}, headers=key))
        join(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(upload_endpoints, "join_parts", overtaken)
    try:
        mine = http_harness("provider", "POST", f"/v1/uploads/{upload}/finish", json={}, headers=key)
    finally:
        other.close()
    assert (mine.status_code, mine.content) == (201, answers[0].content)
    assert mine.headers["Idempotent-Replayed"] == "true"


def test_a_part_sent_again_replaces_the_first(http_harness: HttpHarness, upload: str) -> None:
    put(http_harness, upload, 1, b"nonsense")
    put(http_harness, upload, 1, ROWS)
    assert len(http_harness.store.list()) == 1
    assert finish(http_harness, upload).json()["rows"] == 2


def test_equal_parts_count_as_two(http_harness: HttpHarness, upload: str) -> None:
    put(http_harness, upload, 1, ROWS)
    put(http_harness, upload, 2, ROWS)
    put(http_harness, upload, 1, ROWS.replace(b"fine", b"good"))
    assert finish(http_harness, upload).json()["rows"] == 4


def test_missing_or_invalid_parts_are_reported_and_the_upload_is_kept(http_harness: HttpHarness, upload: str) -> None:
    assert code(finish(http_harness, upload)) == (409, "conflict")
    put(http_harness, upload, 2, ROWS)
    answer = finish(http_harness, upload)
    assert code(answer) == (409, "conflict")
    assert answer.json()["missing"] == [1]
    put(http_harness, upload, 1, b"{text: no JSON}\n")
    before = http_harness.everything()
    assert code(finish(http_harness, upload)) == (422, "data_invalid")
    assert code(finish(http_harness, upload, sha256="0" * 64)) == (422, "invalid_input")
    assert code(put(http_harness, upload, 1, b"")) == (422, "invalid_input")
    for number in ("0", "1001", "x"):
        assert http_harness("provider", "PUT", f"/v1/uploads/{upload}/parts/{number}", content=ROWS).status_code == 422
    assert http_harness.everything() == before
    put(http_harness, upload, 1, ROWS)
    assert finish(http_harness, upload).status_code == 201


def test_a_part_and_the_whole_have_a_maximum_size(home: Path) -> None:
    http_harness = HttpHarness(home, dataset_bytes=100, part_bytes=60)
    try:
        upload = http_harness("provider", "POST", "/v1/uploads", json=REQUEST).json()
        assert (upload["part_bytes"], upload["total_bytes"]) == (60, 100)
        assert code(put(http_harness, upload["id"], 1, b"x" * 61)) == (413, "payload_too_large")
        streamed = http_harness("provider", "PUT", f"/v1/uploads/{upload['id']}/parts/1", content=iter([b"x" * 40] * 2))
        assert code(streamed) == (413, "payload_too_large")
        assert put(http_harness, upload["id"], 1, b"x" * 60).status_code == 200
        assert code(put(http_harness, upload["id"], 2, b"x" * 41)) == (413, "payload_too_large")
        assert put(http_harness, upload["id"], 1, b"x" * 50).status_code == 200
        assert put(http_harness, upload["id"], 2, b"x" * 50).status_code == 200
        assert http_harness.everything()["temporary"] == []
    finally:
        http_harness.close()


def test_a_repeated_finish_gets_the_first_response(http_harness: HttpHarness, upload: str) -> None:
    put(http_harness, upload, 1, ROWS)
    path, headers = f"/v1/uploads/{upload}/finish", {"Idempotency-Key": "finish-1"}
    first, again = (http_harness("provider", "POST", path, json={}, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code, again.content) == (201, 201, first.content)
    other = http_harness("provider", "POST", path, json={"sha256": "0" * 64}, headers=headers)
    assert code(other) == (422, "idempotency_mismatch")
    assert code(finish(http_harness, upload)) == (404, "not_found")


def test_a_name_is_unique(http_harness: HttpHarness, upload: str) -> None:
    put(http_harness, upload, 1, ROWS)
    http_harness.add_dataset("public", ROWS * 2)
    assert code(finish(http_harness, upload)) == (409, "conflict")
    assert code(http_harness("provider", "POST", "/v1/uploads", json=REQUEST)) == (409, "conflict")


def test_an_upload_is_only_visible_to_its_key(http_harness: HttpHarness, upload: str) -> None:
    with http_harness.database.write() as session:
        _, http_harness.keys["other"] = create_key(session, name="other", role=Role.PROVIDER)
    http_harness._clients["other"] = http_harness._client("other")
    put(http_harness, upload, 1, ROWS)
    before = http_harness.everything()
    for who, expected in (("other", (404, "not_found")), ("alice", (403, "forbidden"))):
        for method, path in (("GET", ""), ("PUT", "/parts/1"), ("POST", "/finish"), ("DELETE", "")):
            body = {"json": {}} if method in ("PUT", "POST") else {}
            answer = http_harness(who, method, f"/v1/uploads/{upload}{path}", **body)
            assert code(answer) == expected, (who, method)
    assert http_harness("other", "GET", "/v1/uploads").json()["items"] == []
    assert http_harness.everything() == before


def test_aborted_and_expired_uploads_leave_the_blobs_that_others_need(http_harness: HttpHarness, upload: str) -> None:
    _, student = http_harness.add_pair()
    data = prompt_bytes(student.hash)
    http_harness.push("alice", data)
    config = http_harness.store.read(next(f["sha256"] for f in student.files if f["path"] == "config.json"))
    before = http_harness.store.list()
    for number, content in enumerate((ROWS, data, config), start=1):
        put(http_harness, upload, number, content)
    assert http_harness("provider", "DELETE", f"/v1/uploads/{upload}").status_code == 204
    assert http_harness.store.list() == before
    assert code(http_harness("provider", "DELETE", f"/v1/uploads/{upload}")) == (404, "not_found")
    old = http_harness("provider", "POST", "/v1/uploads", json=REQUEST).json()["id"]
    put(http_harness, old, 1, ROWS)
    with http_harness.database.write() as session:
        session.get_one(UploadRow, old).created_at = now() - LIFETIME - timedelta(minutes=1)
    assert code(http_harness("provider", "GET", f"/v1/uploads/{old}")) == (404, "not_found")
    http_harness("provider", "POST", "/v1/uploads", json=REQUEST)
    assert http_harness.store.list() == before


# --- the client ---------------------------------------------------------------------------------------


class LossyTransport(httpx.BaseTransport):
    """The real network, which loses the responses for the given parts."""

    def __init__(self, *lost: str) -> None:
        self.lost, self.sent = list(lost), list[str]()
        self._real = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        part = request.url.path.rsplit("/", 1)[-1]
        if request.method == "PUT":
            self.sent.append(part)
            if part in self.lost:
                raise httpx.ReadError("lost", request=request)
        return self._real.handle_request(request)

    def close(self) -> None:
        self._real.close()


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of five parts, with a small part size."""
    monkeypatch.setattr("post_client.resources.datasets.IN_PARTS", 1000)
    monkeypatch.setattr("post_client.resources.uploads.PART_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(b'{"text": "%090d"}\n' % n for n in range(45)))
    return path


def test_a_large_file_is_sent_in_parts_and_resumed(http_harness: HttpHarness, large: Path) -> None:
    transport = LossyTransport("3")
    with Client(url=http_harness.url, api_key=http_harness.keys["provider"], transport=transport, attempts=1) as client:
        with pytest.raises(Unavailable):
            client.datasets.create(name="public", kind="rows", content=large, licence="MIT")
        (begun,) = client.uploads.list()
        assert [part.number for part in begun.parts] == [1, 2]
        transport.lost, progress = [], list[tuple[int, int]]()
        created = client.uploads.send(begun.id, file=large, progress=lambda *bytes_sent: progress.append(bytes_sent))
        assert transport.sent == ["1", "2", "3", "3", "4", "5"]
        assert progress[-1] == (large.stat().st_size,) * 2
        assert (created.rows, created.licence, http_harness.store.read(created.sha256)) == (
            45,
            "MIT",
            large.read_bytes(),
        )
        assert client.datasets.create(name="more", kind="rows", content=large).rows == 45
        with pytest.raises(Conflict):
            client.uploads.create(name="more", kind="rows")
        second = client.uploads.create(name="second", kind="corpus")
        with pytest.raises(DataInvalid, match="no such file"):
            client.uploads.send(second.id, file=large.parent / "none")
        client.uploads.put(second.id, number=1, content=b"One.\n")
        with pytest.raises(InvalidInput):
            client.uploads.finish(second.id, sha256="0" * 64)
        client.uploads.delete(second.id)
        with pytest.raises(NotFound):
            client.uploads.get(second.id)
