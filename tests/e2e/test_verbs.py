"""The README's commands, one by one, against a real ``post serve``."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

from tests.e2e.conftest import Machine
from tests.models import LABELS, TEXTS
from tests.server.server_harness import wait_for


def test_all_commands_in_order(machine: Machine) -> None:
    post = machine.post
    distil = ("--target", "large", "--corpus", "prose", "--name", "small", "--steps", 3, "--keep-layers", "0,3")
    student = post("distil", *distil, "--student-init", "copy", "--batch-tokens", 128, "--sequence-length", 32)
    assert student.startswith("mod_")
    assert machine.json("pull", "small", "--to", "student")["id"] == student

    small = ("--steps", 3, "--batch-size", 4, "--num-virtual-tokens", 2, "--out", "p.safetensors")
    post("tune", "--student", "student", "--data", "rows.jsonl", "--task", "sst2", *small)
    source = post("push", "p.safetensors", "--yes")
    transfer = ("--prompt", source, "--target", "large", "--dataset", "public", "--steps", 2)
    target = post("transfer", *transfer, "--alpha", "auto")
    assert "found by Eq. 6" in machine.stderr
    assert target.startswith("prm_")
    assert target != source

    answers = post("predict", "--model", "large", "--prompt", target, "--text", "a fine film", "--text", "dull")
    first, second = map(json.loads, answers.splitlines())
    assert (first["text"], second["text"]) == ("a fine film", "dull")
    assert sum(first["scores"].values()) == pytest.approx(1, abs=1e-3)
    scored = machine.json("predict", "--model", "large", "--prompt", target, "--data", "rows.jsonl", "--out", "o.jsonl")
    lines = [json.loads(line) for line in (machine.folder / "o.jsonl").read_text().splitlines()]
    correct = [line["label"] == label for line, label in zip(lines, LABELS * 4, strict=True)]
    assert scored == {"accuracy": sum(correct) / len(correct), "rows": 32}

    evaluation = machine.json("evaluate", "--model", "large", "--dataset", "public", "--prompt", target)
    assert evaluation["result"]["accuracy"] == pytest.approx(scored["accuracy"], abs=1 / 32)
    jobs = machine.json("jobs", "list")
    assert [job["kind"] for job in jobs] == ["evaluate", "transfer", "distil"]
    assert {job["state"] for job in jobs} == {"succeeded"}


@pytest.mark.slow
def test_a_report_of_a_student(machine: Machine) -> None:
    distil = ("--target", "large", "--corpus", "prose", "--name", "weighed", "--steps", 3, "--keep-layers", "0,3")
    small = ("--student-init", "copy", "--batch-tokens", 128, "--sequence-length", 32)
    distilled = machine.json("distil", *distil, *small)
    rows = [
        json.dumps({"text": f"{a}, {b}", "label": label}) for a, label in zip(TEXTS, LABELS, strict=True) for b in TEXTS
    ]
    (machine.folder / "tasks.jsonl").write_text("\n".join(rows))
    (machine.folder / "unseen.txt").write_text("\n".join(f"{a}, {b}, {a}" for a in TEXTS for b in TEXTS))
    machine.post("dataset", "add", "tasks.jsonl", "--name", "tasks")
    machine.post("dataset", "add", "unseen.txt", "--name", "unseen")
    options = ("weighed", "--public", "tasks=sst2", "--members", "prose", "--non-members", "unseen", "--out", "weighed")
    report = machine.json(
        "report", "make", *options, "--steps", 3, "--batch-size", 4, "--num-virtual-tokens", 2, "--texts", 30
    )
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
    distil += ("--keep-layers", "0,3", "--student-init", "copy", "--batch-tokens", 128, "--sequence-length", 32)
    process = subprocess.Popen(
        machine.command(*distil), env=machine.environment, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    wait_for(lambda: any(job["state"] == "running" for job in machine.json("jobs", "list")), 60)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    job = machine.json("jobs", "list")[0]
    assert job["state"] == "running"
    assert f"post jobs cancel {job['id']}" in stderr
    machine.post("jobs", "cancel", job["id"])
    wait_for(lambda: machine.json("jobs", "show", job["id"])["state"] == "cancelled", 60, 0.5)
