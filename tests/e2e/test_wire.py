"""What depends on private data in the whole traffic of pull → tune → push → transfer → predict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from post_shared.cli.app import build_app, run
from post_shared.files.prompt_file import read_prompt
from tests.e2e.conftest import Machine
from tests.e2e.wire import Request, Wiretap, requests_in

PRIVATE = {
    "ward-seven": [("the patient in bed four was awful", "negative"), ("a nice nurse", "positive")] * 12,
    "clinic": [("great zebra therapy", "positive"), ("dull xylophone hour", "negative"), ("a fine day", "positive")]
    * 9,
}
"""The two sets differ in texts, number of rows, users and file names."""


def workflow(machine: Machine, folder: Path, name: str, tap: Wiretap) -> tuple[list[bytes], bytes]:
    """A data owner's whole workflow with one private data set. Returns the bytes sent and the prompt file."""
    rows = [{"text": text, "label": label, "who": f"{name}-{at}"} for at, (text, label) in enumerate(PRIVATE[name])]
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    prompt, student = folder / f"{name}.safetensors", folder / f"student-{name}"

    def post(*arguments: object) -> None:
        assert run(build_app(), [str(argument) for argument in arguments]) == 0

    post("pull", "wired", "--to", student)
    small = ("--steps", 3, "--batch-size", 4, "--num-virtual-tokens", 2, "--user-column", "who")
    post("tune", "--student", student, "--data", data, "--task", "sst2", "--out", prompt, *small)
    post("push", prompt, "--yes")
    source = _newest(machine, "source")
    post("transfer", "--prompt", source, "--target", "large", "--dataset", "public", "--steps", 2)
    post("predict", "--model", "large", "--prompt", _newest(machine, "target"), "--text", "a public question")
    return tap.take(), prompt.read_bytes()


def _newest(machine: Machine, role: str) -> str:
    """Bypasses the proxy: this request is the test's, not the owner's."""
    from post_client import Client

    with Client(url=machine.environment["POST_URL"], api_key=machine.environment["POST_API_KEY"]) as client:
        return max(client.prompts.list(role=role), key=lambda prompt: prompt.created_at).id


def test_only_the_prompts_numbers_depend_on_private_data(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil = ("--target", "large", "--corpus", "prose", "--name", "wired", "--steps", 2, "--keep-layers", "0,3")
    machine.post("distil", *distil, "--student-init", "copy", "--batch-tokens", 128, "--sequence-length", 32)
    port = int(machine.environment["POST_URL"].rsplit(":", 1)[1].strip("/"))
    monkeypatch.setenv("POST_API_KEY", machine.environment["POST_API_KEY"])
    with Wiretap(port) as tap:
        monkeypatch.setenv("POST_URL", tap.url)
        runs = {name: workflow(machine, tmp_path, name, tap) for name in PRIVATE}
    first, second = (requests_in(sent) for sent, _ in runs.values())
    assert [request.line for request in first] == [request.line for request in second]
    for one, other in zip(first, second, strict=True):
        assert one.headers == other.headers, "including lengths"
        if not one.is_upload:
            assert one.body == other.body
    _check_uploads(first, second, [prompt for _, prompt in runs.values()])
    for name, (sent, _) in runs.items():
        _check_nothing_private(b"".join(sent), name)


def _check_uploads(first: list[Request], second: list[Request], prompts: list[bytes]) -> None:
    uploads = [[request.body for request in requests if request.is_upload] for requests in (first, second)]
    assert uploads == [[prompts[0]], [prompts[1]]]
    header_bytes = [8 + int.from_bytes(body[:8], "little") for body in prompts]
    assert header_bytes[0] == header_bytes[1]
    assert prompts[0][: header_bytes[0]] == prompts[1][: header_bytes[1]], "equal metadata"
    parsed = [read_prompt(body) for body in prompts]
    assert len(prompts[0]) - header_bytes[0] == parsed[0].embeddings.nbytes == 4 * parsed[0].length * parsed[0].width
    assert (parsed[0].embeddings != parsed[1].embeddings).any(), "the only difference"


def _check_nothing_private(sent: bytes, name: str) -> None:
    assert b"a public question" in sent, "the wiretap works"
    for text, _ in PRIVATE[name]:
        for word in text.split():
            assert len(word) < 6 or word.encode() not in sent, word  # shorter words are label words
    for secret in (name, f"{name}-1", str(len(PRIVATE[name])) + " rows", "ledger", "loss"):
        assert secret.encode() not in sent
