"""The README's commands, one by one, against a real ``post serve``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models import LABELS, TEXTS, tiny_model
from tests.server.backstage import wait_for


class Machine:
    """Somebody's machine: a folder, an environment, and the ``post`` command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        clean = {name: value for name, value in os.environ.items() if not name.startswith("POST_")}
        self.environment = clean | {"POST_HOME": str(folder / "home"), "POST_PORT": "0", "POST_DEVICE": "cpu"}

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "post_shared.cli", *map(str, arguments)]

    def post(self, *arguments: object) -> str:
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=200,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def json(self, *arguments: object) -> Any:
        return json.loads(self.post(*arguments, "--json"))


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """With a running ``post serve`` that knows a tiny model, public data and a key for both roles."""
    with tempfile.TemporaryDirectory(prefix="post-") as name:
        machine = Machine(Path(name))
        (machine.folder / "home").mkdir()
        tiny_model("llama", layers=4).save(machine.folder / "large")
        rows = [json.dumps({"text": text, "label": label}) for text, label in zip(TEXTS, LABELS, strict=True)] * 4
        (machine.folder / "rows.jsonl").write_text("\n".join(rows))
        (machine.folder / "corpus.txt").write_text("\n".join(f"{a}. {b}." for a in TEXTS for b in TEXTS))
        machine.post("model", "add", "large", "--name", "large")
        machine.post("dataset", "add", "rows.jsonl", "--name", "public")
        machine.post("dataset", "add", "corpus.txt", "--name", "prose")
        key = machine.post("key", "create", "--role", "provider", "--name", "me").splitlines()[-1]
        with (machine.folder / "log").open("wb") as log:
            server = subprocess.Popen(machine.command("serve"), env=machine.environment, stdout=log, stderr=log)
        try:
            ready = machine.folder / "home" / "serve.json"
            wait_for(ready.exists, 120)
            machine.environment |= {"POST_URL": json.loads(ready.read_text())["url"], "POST_API_KEY": key}
            yield machine
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def test_all_verbs_in_their_order(machine: Machine) -> None:
    post = machine.post
    distil = ("--target", "large", "--corpus", "prose", "--name", "small", "--steps", 3, "--keep-layers", "0,3")
    student = post("distil", *distil, "--start", "copy", "--batch-tokens", 128, "--sequence-length", 32)
    assert student.startswith("mod_")
    assert machine.json("pull", "small", "--to", "student")["id"] == student

    small = ("--steps", 3, "--batch-size", 4, "--length", 2, "--out", "p.safetensors")
    post("tune", "--student", "student", "--data", "rows.jsonl", "--task", "sst2", *small)
    source = post("push", "p.safetensors", "--yes")
    moved = ("--prompt", source, "--target", "large", "--dataset", "public", "--steps", 2)
    target = post("transfer", *moved, "--alpha", "auto")
    assert target.startswith("prm_")
    assert target != source

    answers = post("predict", "--model", "large", "--prompt", target, "--text", "a fine film", "--text", "dull")
    first, second = map(json.loads, answers.splitlines())
    assert (first["text"], second["text"]) == ("a fine film", "dull")
    assert sum(first["scores"].values()) == pytest.approx(1, abs=1e-3)
    scored = machine.json("predict", "--model", "large", "--prompt", target, "--data", "rows.jsonl", "--out", "o.jsonl")
    lines = [json.loads(line) for line in (machine.folder / "o.jsonl").read_text().splitlines()]
    right = [line["label"] == label for line, label in zip(lines, LABELS * 4, strict=True)]
    assert scored == {"accuracy": sum(right) / len(right), "rows": 32}

    measured = machine.json("evaluate", "--model", "large", "--dataset", "public", "--prompt", target)
    assert measured["result"]["accuracy"] == pytest.approx(scored["accuracy"], abs=1 / 32)
    jobs = machine.json("jobs", "list")
    assert [job["kind"] for job in jobs] == ["evaluate", "transfer", "distil"]
    assert {job["state"] for job in jobs} == {"succeeded"}


def test_a_report_of_a_student(machine: Machine) -> None:
    distil = ("--target", "large", "--corpus", "prose", "--name", "weighed", "--steps", 3, "--keep-layers", "0,3")
    small = ("--start", "copy", "--batch-tokens", 128, "--sequence-length", 32)
    distilled = machine.json("distil", *distil, *small)
    rows = [
        json.dumps({"text": f"{a}, {b}", "label": label}) for a, label in zip(TEXTS, LABELS, strict=True) for b in TEXTS
    ]
    (machine.folder / "tasks.jsonl").write_text("\n".join(rows))
    (machine.folder / "unseen.txt").write_text("\n".join(f"{a}, {b}, {a}" for a in TEXTS for b in TEXTS))
    machine.post("dataset", "add", "tasks.jsonl", "--name", "tasks")
    machine.post("dataset", "add", "unseen.txt", "--name", "unseen")
    order = ("weighed", "--public", "tasks=sst2", "--members", "prose", "--non-members", "unseen", "--out", "weighed")
    report = machine.json("report", "make", *order, "--steps", 3, "--batch-size", 4, "--length", 2, "--texts", 30)
    assert report["recorded_loss"]["job_id"] == distilled["id"]
    assert report["recorded_loss"]["losses"]["ce"] == distilled["metrics"]["ce"]
    assert report["student"]["layers"] == 2
    assert 0 < report["parameter_share"] < 1
    assert report["tasks"][0]["test_rows"] == 32
    assert {each["score"] for each in report["leakage"]} == {"min_k", "min_k_plus"}
    assert json.loads((machine.folder / "weighed" / "report.json").read_text()) == report
    assert {path.name for path in (machine.folder / "weighed").iterdir()} == {"report.json", "report.md", "report.png"}
    assert machine.json("report", "show", report["job_id"]) == report


def test_ctrl_c_leaves_a_job_running(machine: Machine) -> None:
    distil = ("distil", "--target", "large", "--corpus", "prose", "--name", "long", "--steps", 10**6)
    distil += ("--keep-layers", "0,3", "--start", "copy", "--batch-tokens", 128, "--sequence-length", 32)
    verb = subprocess.Popen(
        machine.command(*distil), env=machine.environment, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    wait_for(lambda: any(job["state"] == "running" for job in machine.json("jobs", "list")), 60)
    verb.send_signal(signal.SIGINT)
    _, said = verb.communicate(timeout=60)
    assert verb.returncode == 130
    job = machine.json("jobs", "list")[0]
    assert job["state"] == "running"
    assert f"post jobs cancel {job['id']}" in said
    machine.post("jobs", "cancel", job["id"])
    wait_for(lambda: machine.json("jobs", "show", job["id"])["state"] == "cancelled", 60, 0.5)
