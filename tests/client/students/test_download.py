"""A student download is complete and safe, or fails."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from post_client import Client
from post_client.students.download import student_hash
from post_shared.errors import Conflict, Forbidden, IntegrityError, InvalidInput, ModelUnsafe, PostError, Unavailable
from post_shared.files.model_folder import manifest, model_hash
from post_shared.schemas.models import ModelFile
from tests.server.http_harness import HttpHarness

WEIGHTS = save({"embed": np.arange(4000, dtype=np.float32)})
GOOD = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS}


class Breaking(httpx.BaseTransport):
    """The real network; the first ``times`` file bodies are cut off after ``limit`` bytes."""

    def __init__(self, limit: int, times: int) -> None:
        self.limit, self.times = limit, times
        self.ranges: list[str | None] = []
        self._real = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._real.handle_request(request)
        if "/files/" not in request.url.path:
            return response
        self.ranges.append(request.headers.get("range"))
        if not self.times:
            return response
        self.times -= 1
        body = response.read()[: self.limit]

        class Cut(httpx.SyncByteStream):
            def __iter__(self) -> Iterator[bytes]:
                yield body
                raise httpx.ReadError("cut", request=request)

        return httpx.Response(response.status_code, headers=response.headers, stream=Cut())

    def close(self) -> None:
        self._real.close()


def client_of_lying_server(real: dict[str, bytes], /, **changes: Any) -> Client:
    """A client of a server with a manifest and files chosen by the test."""
    entries = [
        ModelFile(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for path, data in real.items()
    ]
    manifest = {"model_id": "mod_1", "name": "small", "files": [e.model_dump() for e in entries]}
    manifest = manifest | {"hash": model_hash(entries)} | changes
    sent = changes.pop("sent", real)
    manifest.pop("sent", None)

    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/manifest"):
            return httpx.Response(200, json=manifest)
        path = request.url.path.split("/files/", 1)[1]
        return httpx.Response(200, stream=httpx.ByteStream(sent.get(path, b"")))

    return Client(url="http://liar", api_key="post_x", transport=httpx.MockTransport(respond), attempts=1)


def test_a_downloaded_student_equals_the_providers(http_harness: HttpHarness, owner: Client, tmp_path: Path) -> None:
    _, student = http_harness.add_pair()
    progress: list[tuple[int, int]] = []
    expected = owner.models.download("small", tmp_path / "student", progress=lambda *at: progress.append(at))
    assert student_hash(tmp_path / "student") == student.hash == expected.hash
    assert manifest(tmp_path / "student") == expected.files
    assert progress == sorted(progress)
    assert progress[-1][0] == progress[-1][1] == sum(file.size for file in expected.files)
    assert os.listdir(tmp_path) == ["student"]


def test_a_second_pull_downloads_nothing(http_harness: HttpHarness, tmp_path: Path) -> None:
    http_harness.add_pair()
    counting = Breaking(0, 0)
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"], transport=counting) as client:
        client.models.download("small", tmp_path / "student")
        downloads = len(counting.ranges)
        progress: list[tuple[int, int]] = []
        expected = client.models.download("small", tmp_path / "student", progress=lambda *at: progress.append(at))
    assert len(counting.ranges) == downloads > 0
    size = sum(file.size for file in expected.files)
    assert progress == [(size, size)], "everything is present"


def test_a_broken_download_resumes_where_it_stopped(http_harness: HttpHarness, tmp_path: Path) -> None:
    _, student = http_harness.add_pair()
    breaking = Breaking(10, 1)
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"], transport=breaking, attempts=1) as client:
        with pytest.raises(Unavailable):
            client.models.download("small", tmp_path / "student")
        assert not (tmp_path / "student").exists()
        client.models.download("small", tmp_path / "student")
    assert student_hash(tmp_path / "student") == student.hash
    assert breaking.ranges[:2] == [None, "bytes=10-"]


def test_broken_connections_within_one_pull_are_retried(http_harness: HttpHarness, tmp_path: Path) -> None:
    _, student = http_harness.add_pair()
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"], transport=Breaking(10, 2)) as client:
        client.models.download("small", tmp_path / "student")
    assert student_hash(tmp_path / "student") == student.hash


def test_a_resumed_file_with_wrong_bytes_is_downloaded_again(
    http_harness: HttpHarness, owner: Client, tmp_path: Path
) -> None:
    _, student = http_harness.add_pair()
    partial = tmp_path / f".student.{student.hash[:16]}.partial"
    partial.mkdir()
    (partial / "config.json").write_bytes(b"garbage")
    (partial / "left-over.json").write_bytes(b"{}")
    owner.models.download("small", tmp_path / "student")
    assert student_hash(tmp_path / "student") == student.hash


def test_a_target_models_files_never_leave(http_harness: HttpHarness, owner: Client, tmp_path: Path) -> None:
    http_harness.add_pair()
    with pytest.raises(Forbidden):
        owner.models.download("large", tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_folder_with_other_content_is_left_alone(http_harness: HttpHarness, owner: Client, tmp_path: Path) -> None:
    http_harness.add_pair()
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.txt").write_text("years of work")
    with pytest.raises(Conflict):
        owner.models.download("small", tmp_path / "student")
    assert (tmp_path / "student" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(Conflict):
        owner.models.download("small", tmp_path / "file")


def test_a_pinned_student_may_not_change(http_harness: HttpHarness, owner: Client, tmp_path: Path) -> None:
    _, student = http_harness.add_pair()
    with pytest.raises(IntegrityError, match="changed it"):
        owner.models.download("small", tmp_path / "student", pin="0" * 64)
    owner.models.download("small", tmp_path / "student", pin=student.hash)


@pytest.mark.parametrize(
    "path",
    [
        "../evil.json",
        "/etc/evil.json",
        "a/../../evil.json",
        "..\\evil.json",
        "C:evil.json",
        ".bashrc",
        "weights.bin",
        "model.pkl",
        "modeling_evil.py",
        "a//b.json",
        "evil\n.json",
        "CONFIG.json",
    ],
)
def test_an_unsafe_path_writes_nothing(path: str, tmp_path: Path) -> None:
    with client_of_lying_server(GOOD | {path: b"{}"}) as client, pytest.raises(ModelUnsafe):
        client.models.download("small", tmp_path / "in" / "student")
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"sent": GOOD | {"config.json": b'{"model_type": "evil!"}'}}, IntegrityError),
        ({"sent": GOOD | {"config.json": GOOD["config.json"] + b" " * 4096}}, IntegrityError),
        ({"sent": GOOD | {"model.safetensors": WEIGHTS[:-4]}}, Unavailable),
        ({"hash": "0" * 64}, IntegrityError),
        ({"hash": "none"}, IntegrityError),
        ({"files": []}, IntegrityError),
        ({"files": "none"}, IntegrityError),
    ],
)
def test_a_lying_server_leaves_no_student(changes: dict[str, Any], kind: type[PostError], tmp_path: Path) -> None:
    with client_of_lying_server(GOOD, **changes) as client, pytest.raises(kind):
        client.models.download("small", tmp_path / "student")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    "config",
    [{"auto_map": {"AutoModel": "evil--modeling.Evil"}}, {"model_type": "llama", "num_hidden_layers": 10**12}],
)
def test_a_model_that_runs_code_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    with (
        client_of_lying_server(GOOD | {"config.json": json.dumps(config).encode()}) as client,
        pytest.raises(ModelUnsafe),
    ):
        client.models.download("small", tmp_path / "student")
    assert not (tmp_path / "student").exists()
    assert not list(tmp_path.rglob("*.json"))


def test_an_unwritable_path_is_named(http_harness: HttpHarness, owner: Client) -> None:
    http_harness.add_pair()
    with pytest.raises(InvalidInput, match="/proc/student"):
        owner.models.download("small", Path("/proc/student"))
