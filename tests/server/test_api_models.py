"""Models: a student can be pulled, whole or in parts; a target's weights never leave."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_server.api.downloads import byte_range
from post_server.model_store import add_model, find_model, materialise_model
from post_server.records import ModelRow
from post_shared.errors import Conflict, ModelUnsafe, RangeInvalid
from post_shared.model_files import model_hash, verify
from post_shared.schemas import ModelManifest, ModelRole
from tests.server.front import Front, code

WEIGHTS = "/v1/models/small/files/model.safetensors"


@pytest.fixture
def student(front: Front) -> ModelRow:
    return front.add_pair()[1]


def test_a_student_is_pulled_and_verified(front: Front, student: ModelRow, tmp_path: Path) -> None:
    manifest = ModelManifest.model_validate(front("alice", "GET", "/v1/models/small/manifest").json())
    assert model_hash(manifest.files) == manifest.hash == student.hash
    for file in manifest.files:
        answer = front("alice", "GET", f"/v1/models/{student.id}/files/{file.path}")
        assert answer.status_code == 200
        assert answer.headers["etag"] == f'"{file.sha256}"'
        assert int(answer.headers["content-length"]) == file.size
        (tmp_path / file.path).write_bytes(answer.content)
    verify(tmp_path, manifest.files)
    materialise_model(front.store, student, tmp_path / "again")
    verify(tmp_path / "again", manifest.files)


@pytest.mark.parametrize("who", ["alice", "provider"])
def test_target_weights_never_leave(front: Front, student: ModelRow, who: str) -> None:
    for path in ("model.safetensors", "config.json", "nothing"):
        assert code(front(who, "GET", f"/v1/models/large/files/{path}")) == (403, "forbidden")


def test_only_files_of_the_manifest_are_served(front: Front, student: ModelRow) -> None:
    for path in ("nothing", "../large/model.safetensors", "%2e%2e/%2e%2e/post.db", "/etc/passwd", "a%00b"):
        assert front("alice", "GET", f"/v1/models/small/files/{path}").status_code in (403, 404)


def test_a_cut_off_download_goes_on(front: Front, student: ModelRow) -> None:
    whole = front("alice", "GET", WEIGHTS).content
    etag = f'"{hashlib.sha256(whole).hexdigest()}"'
    for header, part in (
        ("bytes=100-", whole[100:]),
        ("bytes=0-0", whole[:1]),
        ("bytes=10-19", whole[10:20]),
        ("bytes=-7", whole[-7:]),
        ("bytes=5-999999", whole[5:]),
    ):
        answer = front("alice", "GET", WEIGHTS, headers={"Range": header, "If-Range": etag})
        assert answer.status_code == 206
        assert answer.content == part
        first = whole.find(part) if header != "bytes=0-0" else 0
        assert answer.headers["content-range"] == f"bytes {first}-{first + len(part) - 1}/{len(whole)}"


def test_a_part_of_another_version_is_never_mixed_in(front: Front, student: ModelRow) -> None:
    answer = front("alice", "GET", WEIGHTS, headers={"Range": "bytes=100-", "If-Range": '"0123"'})
    assert answer.status_code == 200
    assert answer.content == front("alice", "GET", WEIGHTS).content


def test_a_range_behind_the_end_says_how_long_the_file_is(front: Front, student: ModelRow) -> None:
    size = len(front("alice", "GET", WEIGHTS).content)
    answer = front("alice", "GET", WEIGHTS, headers={"Range": f"bytes={size}-"})
    assert code(answer) == (416, "range_invalid")
    assert answer.headers["content-range"] == f"bytes */{size}"


def test_what_the_caller_has_is_not_sent_again(front: Front, student: ModelRow) -> None:
    etag = front("alice", "GET", WEIGHTS).headers["etag"]
    for header in (etag, f'"0", W/{etag}', "*"):
        answer = front("alice", "GET", WEIGHTS, headers={"If-None-Match": header})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
    assert front("alice", "GET", WEIGHTS, headers={"If-None-Match": '"0"'}).status_code == 200


@given(header=st.text(max_size=30) | st.from_regex(r"bytes=\d{0,4}-\d{0,4}", fullmatch=True), size=st.integers(0, 2000))
def test_a_range_lies_within_the_file(header: str, size: int) -> None:
    try:
        found = byte_range(header, size)
    except RangeInvalid:
        return
    assert found is None or 0 <= found[0] < found[1] <= size


def test_models_are_found_by_name_id_and_role(front: Front, student: ModelRow) -> None:
    for reference in ("small", student.id):
        found = front("bob", "GET", f"/v1/models/{reference}").json()
        assert (found["id"], found["name"], found["role"]) == (student.id, "small", "student")
    assert found["target_id"] == front("bob", "GET", "/v1/models/large").json()["id"]
    for role, names in (("student", ["small"]), ("target", ["large"]), (None, ["small", "large"])):
        params = {} if role is None else {"role": role}
        items = front("bob", "GET", "/v1/models", params=params).json()["items"]
        assert [item["name"] for item in items] == names
    assert code(front("bob", "GET", "/v1/models/unknown")) == (404, "not_found")


def _facts(row: ModelRow) -> dict[str, object]:
    names = ("kind", "architecture", "layers", "hidden_size", "vocabulary", "parameters")
    return {name: getattr(row, name) for name in names}


def test_adding_a_model_again_is_harmless_and_a_name_is_taken_once(
    front: Front, student: ModelRow, tmp_path: Path
) -> None:
    folder = materialise_model(front.store, student, tmp_path / "same")
    with front.database.write() as session:
        same = add_model(session, front.store, folder, name="small", role=ModelRole.STUDENT, **_facts(student))
        assert same.id == student.id
    with front.database.write() as session, pytest.raises(Conflict):
        add_model(session, front.store, folder, name="large", role=ModelRole.TARGET, **_facts(student))


def test_an_unsafe_folder_is_not_stored(front: Front, student: ModelRow, tmp_path: Path) -> None:
    folder = materialise_model(front.store, student, tmp_path / "bad")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    before = front.everything()
    with pytest.raises(ModelUnsafe), front.database.write() as session:
        add_model(session, front.store, folder, name="bad", role=ModelRole.TARGET, **_facts(student))
    assert front.everything() == before
    with front.database.read() as session:
        assert find_model(session, "small").id == student.id
