"""Pushing prompts: nothing of a refused prompt is stored, and owners see only their own."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable

import numpy as np
import pytest

from post_server.db.tables import ModelRow
from post_server.prompts.service import add_prompt
from post_shared.schemas.prompts import PromptRole
from tests.server.http_harness import WIDTH, HttpHarness, code, prompt_bytes


@pytest.fixture
def student(http_harness: HttpHarness) -> ModelRow:
    return http_harness.add_pair()[1]


def _with_header(data: bytes, change: Callable[[dict[str, object]], object]) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _nan(data: bytes) -> bytes:
    return data[:-4] + np.float32("nan").tobytes()


def _numpy_pickle(data: bytes) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return stream.getvalue()


INVALID: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-1],
    "cut in the header": lambda data: data[:40],
    "too long": lambda data: data + b"\0\0\0\0",
    "NaN": _nan,
    "2 GB header": lambda data: struct.pack("<Q", 2 * 2**30) + data[8:],
    "header beyond all": lambda data: b"\xff" * 8 + data[8:],
    "pickle": lambda data: pickle.dumps({"prompt_embeddings": [0.0]}),
    "numpy pickle": _numpy_pickle,
    "text": lambda data: b"it was a wonderful film " * 50,
    "two tensors": lambda data: _with_header(
        data, lambda h: h.update({"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
    ),
    "another member": lambda data: _with_header(data, lambda h: h["__metadata__"].update(rows="120")),
    "another version": lambda data: _with_header(data, lambda h: h["__metadata__"].update(version="2")),
    "no task": lambda data: _with_header(data, lambda h: h["__metadata__"].pop("task")),
    "task without a slot": lambda data: _with_header(
        data, lambda h: h["__metadata__"].update(task='{"template":"it was"}')
    ),
}


@pytest.mark.parametrize("kind", INVALID)
def test_an_invalid_prompt_file_is_refused_and_not_stored(
    http_harness: HttpHarness, student: ModelRow, kind: str
) -> None:
    before = http_harness.everything()
    answer = http_harness.push("alice", INVALID[kind](prompt_bytes(student.hash)))
    assert code(answer) == (422, "prompt_file_invalid")
    assert http_harness.everything() == before


def test_a_prompt_for_another_model_is_refused_and_not_stored(http_harness: HttpHarness, student: ModelRow) -> None:
    before = http_harness.everything()
    wrong_hash, wrong_width = prompt_bytes("0" * 64), prompt_bytes(student.hash, width=WIDTH + 1)
    for data in (wrong_hash, wrong_width):
        assert code(http_harness.push("alice", data)) == (422, "prompt_mismatch")
    assert http_harness.everything() == before


def test_a_prompt_larger_than_allowed_is_refused_while_it_arrives(limited_http_harness: HttpHarness) -> None:
    """With and without a declared length."""
    http_harness = limited_http_harness
    before = http_harness.everything()
    for content in (b"x" * 20_000, iter([b"x" * 1000] * 20)):
        answer = http_harness("alice", "POST", "/v1/prompts", content=content)
        assert code(answer) == (413, "payload_too_large")
    assert http_harness.everything() == before


def test_pushed_bytes_are_returned_unchanged(http_harness: HttpHarness, student: ModelRow) -> None:
    data = prompt_bytes(student.hash, dp=True)
    answer = http_harness.push("alice", data)
    assert answer.status_code == 201
    prompt = answer.json()
    assert (prompt["role"], prompt["length"], prompt["width"]) == ("source", 3, WIDTH)
    assert (prompt["model_id"], prompt["model_hash"]) == (student.id, student.hash)
    assert (prompt["epsilon"], prompt["delta"]) == (8.0, 1e-5)
    assert list(prompt["task"]["label_words"]) == ["positive", "negative"]  # scores have the same request
    assert http_harness("alice", "GET", f"/v1/prompts/{prompt['id']}").json() == prompt
    file = http_harness("alice", "GET", f"/v1/prompts/{prompt['id']}/file")
    assert file.content == data
    assert file.headers["etag"] == f'"{prompt["sha256"]}"'


def test_the_same_bytes_of_one_key_are_the_same_prompt(http_harness: HttpHarness, student: ModelRow) -> None:
    data = prompt_bytes(student.hash)
    first, again, other = (http_harness.push(who, data) for who in ("alice", "alice", "bob"))
    assert (first.status_code, again.status_code, other.status_code) == (201, 200, 201)
    assert first.json() == again.json()
    assert other.json()["id"] != first.json()["id"]


def test_an_owner_sees_only_its_own_prompts(http_harness: HttpHarness, student: ModelRow) -> None:
    mine = http_harness.push("alice", prompt_bytes(student.hash)).json()["id"]
    theirs = http_harness.push("bob", prompt_bytes(student.hash, seed=1)).json()["id"]
    for method, path in (("GET", ""), ("GET", "/file"), ("DELETE", "")):
        answer = http_harness("alice", method, f"/v1/prompts/{theirs}{path}")
        assert code(answer) == (404, "not_found")
        unknown = http_harness("alice", method, f"/v1/prompts/prm_unknown{path}")
        assert answer.json()["title"] == unknown.json()["title"]
    assert [item["id"] for item in http_harness("alice", "GET", "/v1/prompts").json()["items"]] == [mine]
    assert [item["id"] for item in http_harness("provider", "GET", "/v1/prompts").json()["items"]] == [theirs, mine]


def test_an_owner_can_not_download_a_target_prompt(http_harness: HttpHarness, student: ModelRow) -> None:
    source = http_harness.push("alice", prompt_bytes(student.hash)).json()["id"]
    target_hash = http_harness("alice", "GET", "/v1/models/large").json()["hash"]
    with http_harness.database.write() as session:
        row, _ = add_prompt(
            session,
            http_harness.store,
            prompt_bytes(target_hash, seed=2),
            role=PromptRole.TARGET,
            owner_key_id=http_harness.key_ids["alice"],
            source_id=source,
        )
    shown = http_harness("alice", "GET", f"/v1/prompts/{row.id}").json()
    assert (shown["role"], shown["source_id"]) == ("target", source)
    assert code(http_harness("alice", "GET", f"/v1/prompts/{row.id}/file")) == (403, "forbidden")
    assert code(http_harness("bob", "GET", f"/v1/prompts/{row.id}/file")) == (404, "not_found")
    assert http_harness("provider", "GET", f"/v1/prompts/{row.id}/file").status_code == 200
    by_role = http_harness("alice", "GET", "/v1/prompts", params={"role": "target"}).json()["items"]
    assert [item["id"] for item in by_role] == [row.id]


def test_deleting_removes_the_bytes_once_no_prompt_has_them(http_harness: HttpHarness, student: ModelRow) -> None:
    data = prompt_bytes(student.hash)
    mine, theirs = (http_harness.push(who, data).json() for who in ("alice", "bob"))
    assert http_harness("alice", "DELETE", f"/v1/prompts/{mine['id']}").status_code == 204
    assert http_harness.store.exists(mine["sha256"])
    assert http_harness("bob", "GET", f"/v1/prompts/{theirs['id']}/file").content == data
    assert http_harness("bob", "DELETE", f"/v1/prompts/{theirs['id']}").status_code == 204
    assert not http_harness.store.exists(mine["sha256"])
    assert code(http_harness("bob", "DELETE", f"/v1/prompts/{theirs['id']}")) == (404, "not_found")


def test_a_prompt_of_an_unfinished_job_can_not_be_deleted(http_harness: HttpHarness, student: ModelRow) -> None:
    http_harness.add_dataset()
    prompt = http_harness.push("alice", prompt_bytes(student.hash)).json()["id"]
    request = {"prompt": prompt, "target": "large", "dataset": "public"}
    job = http_harness("alice", "POST", "/v1/transfers", json=request).json()["id"]
    assert code(http_harness("alice", "DELETE", f"/v1/prompts/{prompt}")) == (409, "conflict")
    http_harness("alice", "POST", f"/v1/jobs/{job}/cancel")
    assert http_harness("alice", "DELETE", f"/v1/prompts/{prompt}").status_code == 204
