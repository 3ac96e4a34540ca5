"""Pushing prompts: what is refused leaves nothing behind, and nobody sees another's."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable

import numpy as np
import pytest

from post_server.prompt_store import add_prompt
from post_server.records import ModelRow
from post_shared.schemas import PromptRole
from tests.server.front import WIDTH, Front, code, prompt_bytes


@pytest.fixture
def student(front: Front) -> ModelRow:
    return front.add_pair()[1]


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
def test_what_is_no_prompt_file_is_refused_and_leaves_nothing(front: Front, student: ModelRow, kind: str) -> None:
    before = front.everything()
    answer = front.push("alice", INVALID[kind](prompt_bytes(student.hash)))
    assert code(answer) == (422, "prompt_file_invalid")
    assert front.everything() == before


def test_a_prompt_for_another_model_is_refused_and_leaves_nothing(front: Front, student: ModelRow) -> None:
    before = front.everything()
    wrong_hash, wrong_width = prompt_bytes("0" * 64), prompt_bytes(student.hash, width=WIDTH + 1)
    for data in (wrong_hash, wrong_width):
        assert code(front.push("alice", data)) == (422, "prompt_mismatch")
    assert front.everything() == before


def test_a_prompt_larger_than_allowed_is_refused_while_it_arrives(small_front: Front) -> None:
    """With and without a declared length."""
    front = small_front
    before = front.everything()
    for content in (b"x" * 20_000, iter([b"x" * 1000] * 20)):
        answer = front("alice", "POST", "/v1/prompts", content=content)
        assert code(answer) == (413, "payload_too_large")
    assert front.everything() == before


def test_pushed_bytes_come_back_as_they_were(front: Front, student: ModelRow) -> None:
    data = prompt_bytes(student.hash, dp=True)
    answer = front.push("alice", data)
    assert answer.status_code == 201
    prompt = answer.json()
    assert (prompt["role"], prompt["length"], prompt["width"]) == ("source", 3, WIDTH)
    assert (prompt["model_id"], prompt["model_hash"]) == (student.id, student.hash)
    assert (prompt["epsilon"], prompt["delta"]) == (8.0, 1e-5)
    assert list(prompt["task"]["label_words"]) == ["positive", "negative"]  # their order is the order of scores
    assert front("alice", "GET", f"/v1/prompts/{prompt['id']}").json() == prompt
    file = front("alice", "GET", f"/v1/prompts/{prompt['id']}/file")
    assert file.content == data
    assert file.headers["etag"] == f'"{prompt["sha256"]}"'


def test_the_same_bytes_again_are_the_same_prompt_of_one_key(front: Front, student: ModelRow) -> None:
    data = prompt_bytes(student.hash)
    first, again, other = (front.push(who, data) for who in ("alice", "alice", "bob"))
    assert (first.status_code, again.status_code, other.status_code) == (201, 200, 201)
    assert first.json() == again.json()
    assert other.json()["id"] != first.json()["id"]


def test_an_owner_sees_its_own_prompts_only(front: Front, student: ModelRow) -> None:
    mine = front.push("alice", prompt_bytes(student.hash)).json()["id"]
    theirs = front.push("bob", prompt_bytes(student.hash, seed=1)).json()["id"]
    for method, path in (("GET", ""), ("GET", "/file"), ("DELETE", "")):
        answer = front("alice", method, f"/v1/prompts/{theirs}{path}")
        assert code(answer) == (404, "not_found")
        unknown = front("alice", method, f"/v1/prompts/prm_unknown{path}")
        assert answer.json()["title"] == unknown.json()["title"]
    assert [each["id"] for each in front("alice", "GET", "/v1/prompts").json()["items"]] == [mine]
    assert [each["id"] for each in front("provider", "GET", "/v1/prompts").json()["items"]] == [theirs, mine]


def test_a_target_prompt_never_reaches_an_owner(front: Front, student: ModelRow) -> None:
    source = front.push("alice", prompt_bytes(student.hash)).json()["id"]
    target_hash = front("alice", "GET", "/v1/models/large").json()["hash"]
    with front.database.write() as session:
        row, _ = add_prompt(
            session,
            front.store,
            prompt_bytes(target_hash, seed=2),
            role=PromptRole.TARGET,
            owner_key_id=front.key_ids["alice"],
            source_id=source,
        )
    shown = front("alice", "GET", f"/v1/prompts/{row.id}").json()
    assert (shown["role"], shown["source_id"]) == ("target", source)
    assert code(front("alice", "GET", f"/v1/prompts/{row.id}/file")) == (403, "forbidden")
    assert code(front("bob", "GET", f"/v1/prompts/{row.id}/file")) == (404, "not_found")
    assert front("provider", "GET", f"/v1/prompts/{row.id}/file").status_code == 200
    by_role = front("alice", "GET", "/v1/prompts", params={"role": "target"}).json()["items"]
    assert [each["id"] for each in by_role] == [row.id]


def test_deleting_removes_the_bytes_once_nobody_needs_them(front: Front, student: ModelRow) -> None:
    data = prompt_bytes(student.hash)
    mine, theirs = (front.push(who, data).json() for who in ("alice", "bob"))
    assert front("alice", "DELETE", f"/v1/prompts/{mine['id']}").status_code == 204
    assert front.store.exists(mine["sha256"])
    assert front("bob", "GET", f"/v1/prompts/{theirs['id']}/file").content == data
    assert front("bob", "DELETE", f"/v1/prompts/{theirs['id']}").status_code == 204
    assert not front.store.exists(mine["sha256"])
    assert code(front("bob", "DELETE", f"/v1/prompts/{theirs['id']}")) == (404, "not_found")


def test_a_prompt_that_a_job_waits_for_stays(front: Front, student: ModelRow) -> None:
    front.add_dataset()
    prompt = front.push("alice", prompt_bytes(student.hash)).json()["id"]
    order = {"prompt": prompt, "target": "large", "dataset": "public"}
    job = front("alice", "POST", "/v1/transfers", json=order).json()["id"]
    assert code(front("alice", "DELETE", f"/v1/prompts/{prompt}")) == (409, "conflict")
    front("alice", "POST", f"/v1/jobs/{job}/cancel")
    assert front("alice", "DELETE", f"/v1/prompts/{prompt}").status_code == 204
