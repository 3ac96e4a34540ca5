"""All traffic of pull → tune → push → transfer → predict, on the socket: what in it depends on private data."""

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
"""Other texts, other numbers of rows, other users, other file names."""


def journey(machine: Machine, folder: Path, name: str, tap: Wiretap) -> tuple[list[bytes], bytes]:
    """A data owner's whole way with one private data set; the bytes that left, and the prompt file."""
    rows = [{"text": text, "label": label, "who": f"{name}-{at}"} for at, (text, label) in enumerate(PRIVATE[name])]
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    prompt, student = folder / f"{name}.safetensors", folder / f"student-{name}"

    def post(*arguments: object) -> None:
        assert run(build_app(), [str(each) for each in arguments]) == 0

    post("pull", "wired", "--to", student)
    small = ("--steps", 3, "--batch-size", 4, "--num-virtual-tokens", 2, "--user-column", "who")
    post("tune", "--student", student, "--data", data, "--task", "sst2", "--out", prompt, *small)
    post("push", prompt, "--yes")
    source = _newest(machine, "source")
    post("transfer", "--prompt", source, "--target", "large", "--dataset", "public", "--steps", 2)
    post("predict", "--model", "large", "--prompt", _newest(machine, "target"), "--text", "a public question")
    return tap.take(), prompt.read_bytes()


def _newest(machine: Machine, role: str) -> str:
    """Past the proxy: this is the test's question, not the owner's."""
    from post_client import Client

    with Client(url=machine.environment["POST_URL"], api_key=machine.environment["POST_API_KEY"]) as client:
        found = max(client.prompts.list(role=role), key=lambda prompt: prompt.created_at)
        return found.id


def test_only_the_numbers_of_the_prompt_depend_on_private_data(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil = ("--target", "large", "--corpus", "prose", "--name", "wired", "--steps", 2, "--keep-layers", "0,3")
    machine.post("distil", *distil, "--student-init", "copy", "--batch-tokens", 128, "--sequence-length", 32)
    port = int(machine.environment["POST_URL"].rsplit(":", 1)[1].strip("/"))
    monkeypatch.setenv("POST_API_KEY", machine.environment["POST_API_KEY"])
    with Wiretap(port) as tap:
        monkeypatch.setenv("POST_URL", tap.url)
        caught = {name: journey(machine, tmp_path, name, tap) for name in PRIVATE}
    first, second = (requests_in(sent) for sent, _ in caught.values())
    assert [request.line for request in first] == [request.line for request in second]
    for one, other in zip(first, second, strict=True):
        assert one.headers == other.headers, "lengths are the same too"
        if not one.is_upload:
            assert one.body == other.body
    _check_uploads(first, second, [prompt for _, prompt in caught.values()])
    for name, (sent, _) in caught.items():
        _check_nothing_private(b"".join(sent), name)


def _check_uploads(first: list[Request], second: list[Request], prompts: list[bytes]) -> None:
    uploads = [[request.body for request in some if request.is_upload] for some in (first, second)]
    assert uploads == [[prompts[0]], [prompts[1]]]
    tensors = [8 + int.from_bytes(body[:8], "little") for body in prompts]
    assert tensors[0] == tensors[1]
    assert prompts[0][: tensors[0]] == prompts[1][: tensors[1]], "the metadata is the same"
    made = [read_prompt(body) for body in prompts]
    assert len(prompts[0]) - tensors[0] == made[0].embeddings.nbytes == 4 * made[0].length * made[0].width
    assert (made[0].embeddings != made[1].embeddings).any(), "all that differs"


def _check_nothing_private(everything: bytes, name: str) -> None:
    assert b"a public question" in everything, "the tap works"
    for text, _ in PRIVATE[name]:
        for word in text.split():
            assert len(word) < 6 or word.encode() not in everything, word  # shorter ones are label words
    for secret in (name, f"{name}-1", str(len(PRIVATE[name])) + " rows", "ledger", "loss"):
        assert secret.encode() not in everything
