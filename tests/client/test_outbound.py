"""The upload request, the only way out, checked byte for byte."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from post_client import Client, OutboundRequest, build_upload
from post_client.outbound import describe
from post_shared.errors import InvalidInput
from post_shared.files.prompt_file import PromptFile, read_prompt, write_prompt
from post_shared.schemas.tasks import TaskSpec
from tests.server.http_harness import TASK, prompt_bytes

HASH = "ab" * 32


def a_prompt(*, dp: bool = True) -> PromptFile:
    return read_prompt(prompt_bytes(HASH, dp=dp))


def bytes_sent(prompt: PromptFile) -> bytes:
    """The bytes that an upload writes to a socket."""
    received = bytearray()
    document = {
        "id": "prm_1", "role": "source", "model_id": "mod_1", "model_hash": HASH, "length": 3, "width": 8,
        "task": TASK.model_dump(), "sha256": HASH, "size_bytes": 1, "created_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    answer = json.dumps(document).encode()

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.settimeout(10)
            while b"\r\n\r\n" not in received or len(received) < len(received.partition(b"\r\n\r\n")[0]) + 4 + len(
                write_prompt(prompt)
            ):
                received.extend(connection.recv(65536))
            connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\n")
            connection.sendall(b"Content-Length: %d\r\n\r\n" % len(answer) + answer)
            connection.settimeout(0.3)
            with contextlib.suppress(TimeoutError):  # nothing more may arrive
                received.extend(connection.recv(65536))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        with Client(url=f"http://127.0.0.1:{listening.getsockname()[1]}", api_key="post_secret") as client:
            client.prompts.upload(build_upload(prompt))
        thread.join()
        bytes_sent.port = listening.getsockname()[1]  # type: ignore[attr-defined]
    return bytes(received)


@pytest.mark.parametrize("dp", [True, False])
def test_the_wire_carries_the_built_request_and_nothing_else(dp: bool) -> None:
    prompt = a_prompt(dp=dp)
    request = build_upload(prompt)
    head, _, body = bytes_sent(prompt).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert body == request.body == write_prompt(prompt)
    assert first == "POST /v1/prompts HTTP/1.1"
    port = bytes_sent.port  # type: ignore[attr-defined]
    expected = {f"{name}: {value}" for name, value in request.headers}
    assert set(lines) == expected | {f"Host: 127.0.0.1:{port}", "Authorization: Bearer post_secret"}
    assert len(lines) == len(expected) + 2


@pytest.mark.parametrize("dp", [True, False])
def test_the_body_is_one_tensor_and_the_documented_metadata(dp: bool, tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(build_upload(a_prompt(dp=dp)).body)
    with safe_open(tmp_path / "body", "np") as file:
        assert list(file.keys()) == ["prompt_embeddings"]
        metadata = file.metadata()
    documented = {"format", "version", "model_hash", "task"} | ({"epsilon", "delta"} if dp else set())
    assert set(metadata) == documented
    assert json.loads(metadata["task"]) == TASK.model_dump()


def test_the_request_depends_on_the_prompt_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build_upload(a_prompt()).to_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("HOSTNAME", "machine-of-somebody")
    monkeypatch.setattr("time.time", lambda: 0.0)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert build_upload(a_prompt()).to_bytes() == before


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.text(min_size=1, max_size=20).filter(lambda text: text.strip() and text.isprintable() and "{" not in text),
)
def test_what_is_shown_matches_the_bytes(length: int, width: int, word: str) -> None:
    task = TaskSpec(template="{text} " + word.replace("}", ""), label_words={"a": [word], "b": [word + "x"]})
    prompt = PromptFile(np.ones((length, width), np.float32), HASH, task)
    request = build_upload(prompt)
    facts = describe(request)
    assert facts["template"] == task.template
    assert facts["label_words"] == task.label_words
    assert facts["numbers"] == f"{length} vectors of {width} float32"
    assert facts["body_bytes"] == len(request.body)
    assert request.to_bytes().endswith(b"\r\n\r\n" + request.body)


GOOD = build_upload(a_prompt())


@pytest.mark.parametrize(
    "request_",
    [
        replace(GOOD, body=GOOD.body + b"accuracy=0.91"),
        replace(GOOD, path="/v1/prompts?rows=4000"),
        replace(GOOD, path="/v1/datasets"),
        replace(GOOD, method="PUT"),
        replace(GOOD, headers=(*GOOD.headers, ("X-Rows", "4000"))),
        replace(GOOD, headers=GOOD.headers[:-1]),
        replace(GOOD, headers=(*GOOD.headers[:-1], ("User-Agent", "post-client/1 (Linux; my-laptop)"))),
        replace(GOOD, body=b""),
        replace(GOOD, body=b"{}"),
        GOOD.body,
    ],
)
def test_any_other_request_is_refused(request_: OutboundRequest) -> None:
    def never(*_: object) -> None:
        raise AssertionError("something was sent")

    with Client(url="http://127.0.0.1:1", api_key="post_x") as client:
        client._http.wire.send = never  # type: ignore[method-assign]
        with pytest.raises((InvalidInput, AttributeError)) as refused:
            client.prompts.upload(request_)
        assert isinstance(refused.value, InvalidInput)
