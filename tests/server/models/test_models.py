"""Models: a student can be downloaded, whole or in ranges; a target's weights never leave the provider."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_server.db.tables import ModelRow
from post_server.http.range_requests import byte_range
from post_server.models.service import add_model, find_model, materialise_model
from post_shared.errors import Conflict, ModelUnsafe, RangeInvalid
from post_shared.files.model_folder import model_hash, verify
from post_shared.schemas.models import ModelManifest, ModelRole
from tests.server.http_harness import HttpHarness, code

WEIGHTS = "/v1/models/small/files/model.safetensors"


@pytest.fixture
def student(http_harness: HttpHarness) -> ModelRow:
    return http_harness.add_pair()[1]


def test_a_student_is_pulled_and_verified(http_harness: HttpHarness, student: ModelRow, tmp_path: Path) -> None:
    manifest = ModelManifest.model_validate(http_harness("alice", "GET", "/v1/models/small/manifest").json())
    assert model_hash(manifest.files) == manifest.hash == student.hash
    for file in manifest.files:
        answer = http_harness("alice", "GET", f"/v1/models/{student.id}/files/{file.path}")
        assert answer.status_code == 200
        assert answer.headers["etag"] == f'"{file.sha256}"'
        assert int(answer.headers["content-length"]) == file.size
        (tmp_path / file.path).write_bytes(answer.content)
    verify(tmp_path, manifest.files)
    materialise_model(http_harness.store, student, tmp_path / "again")
    verify(tmp_path / "again", manifest.files)


@pytest.mark.parametrize("who", ["alice", "provider"])
def test_target_weights_are_never_served(http_harness: HttpHarness, student: ModelRow, who: str) -> None:
    for path in ("model.safetensors", "config.json", "nothing"):
        assert code(http_harness(who, "GET", f"/v1/models/large/files/{path}")) == (403, "forbidden")


def test_only_files_of_the_manifest_are_served(http_harness: HttpHarness, student: ModelRow) -> None:
    for path in ("nothing", "../large/model.safetensors", "%2e%2e/%2e%2e/post.db", "/etc/passwd", "a%00b"):
        assert http_harness("alice", "GET", f"/v1/models/small/files/{path}").status_code in (403, 404)


def test_an_interrupted_download_is_resumed(http_harness: HttpHarness, student: ModelRow) -> None:
    whole = http_harness("alice", "GET", WEIGHTS).content
    etag = f'"{hashlib.sha256(whole).hexdigest()}"'
    for header, part in (
        ("bytes=100-", whole[100:]),
        ("bytes=0-0", whole[:1]),
        ("bytes=10-19", whole[10:20]),
        ("bytes=-7", whole[-7:]),
        ("bytes=5-999999", whole[5:]),
    ):
        answer = http_harness("alice", "GET", WEIGHTS, headers={"Range": header, "If-Range": etag})
        assert answer.status_code == 206
        assert answer.content == part
        first = whole.find(part) if header != "bytes=0-0" else 0
        assert answer.headers["content-range"] == f"bytes {first}-{first + len(part) - 1}/{len(whole)}"


def test_a_range_of_another_version_is_not_served(http_harness: HttpHarness, student: ModelRow) -> None:
    answer = http_harness("alice", "GET", WEIGHTS, headers={"Range": "bytes=100-", "If-Range": '"0123"'})
    assert answer.status_code == 200
    assert answer.content == http_harness("alice", "GET", WEIGHTS).content


def test_a_range_after_the_end_is_refused_with_the_size(http_harness: HttpHarness, student: ModelRow) -> None:
    size = len(http_harness("alice", "GET", WEIGHTS).content)
    answer = http_harness("alice", "GET", WEIGHTS, headers={"Range": f"bytes={size}-"})
    assert code(answer) == (416, "range_invalid")
    assert answer.headers["content-range"] == f"bytes */{size}"


def test_a_file_that_the_caller_has_is_not_sent_again(http_harness: HttpHarness, student: ModelRow) -> None:
    etag = http_harness("alice", "GET", WEIGHTS).headers["etag"]
    for header in (etag, f'"0", W/{etag}', "*"):
        answer = http_harness("alice", "GET", WEIGHTS, headers={"If-None-Match": header})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
    assert http_harness("alice", "GET", WEIGHTS, headers={"If-None-Match": '"0"'}).status_code == 200


@given(header=st.text(max_size=30) | st.from_regex(r"bytes=\d{0,4}-\d{0,4}", fullmatch=True), size=st.integers(0, 2000))
def test_a_range_lies_within_the_file(header: str, size: int) -> None:
    try:
        selected = byte_range(header, size)
    except RangeInvalid:
        return
    assert selected is None or 0 <= selected[0] < selected[1] <= size


def test_models_are_found_by_name_id_and_role(http_harness: HttpHarness, student: ModelRow) -> None:
    for reference in ("small", student.id):
        model = http_harness("bob", "GET", f"/v1/models/{reference}").json()
        assert (model["id"], model["name"], model["role"]) == (student.id, "small", "student")
    assert model["target_id"] == http_harness("bob", "GET", "/v1/models/large").json()["id"]
    for role, names in (("student", ["small"]), ("target", ["large"]), (None, ["small", "large"])):
        params = {} if role is None else {"role": role}
        items = http_harness("bob", "GET", "/v1/models", params=params).json()["items"]
        assert [item["name"] for item in items] == names
    assert code(http_harness("bob", "GET", "/v1/models/unknown")) == (404, "not_found")


def _facts(row: ModelRow) -> dict[str, object]:
    names = ("kind", "architecture", "layers", "hidden_size", "vocabulary", "parameters")
    return {name: getattr(row, name) for name in names}


def test_adding_a_model_again_is_harmless_and_a_name_is_unique(
    http_harness: HttpHarness, student: ModelRow, tmp_path: Path
) -> None:
    folder = materialise_model(http_harness.store, student, tmp_path / "same")
    with http_harness.database.write() as session:
        same = add_model(session, http_harness.store, folder, name="small", role=ModelRole.STUDENT, **_facts(student))
        assert same.id == student.id
    with http_harness.database.write() as session, pytest.raises(Conflict):
        add_model(session, http_harness.store, folder, name="large", role=ModelRole.TARGET, **_facts(student))


def test_an_unsafe_folder_is_not_stored(http_harness: HttpHarness, student: ModelRow, tmp_path: Path) -> None:
    folder = materialise_model(http_harness.store, student, tmp_path / "bad")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    before = http_harness.everything()
    with pytest.raises(ModelUnsafe), http_harness.database.write() as session:
        add_model(session, http_harness.store, folder, name="bad", role=ModelRole.TARGET, **_facts(student))
    assert http_harness.everything() == before
    with http_harness.database.read() as session:
        assert find_model(session, "small").id == student.id
