"""The full audit, from rows to figures, and ``post audit``."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors.torch import load

from post_client import console
from post_client.audit import Arm, AuditConfig, audit, to_json, to_markdown, to_picture
from post_client.privacy import PrivacyConfig
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput
from post_shared.schemas.tuning import TuneOptions
from tests.client.terminal import Captured, post
from tests.models import LABELS, TEXTS, WORDS, tiny_model

TASK = Task.preset("sst2")
WORD = WORDS.split()
ROWS = [Row(f"{text} {WORD[at % len(WORD)]} {WORD[at // 4]}", label)
        for at, (text, label) in enumerate(zip(TEXTS * 5, LABELS * 5, strict=True))]  # fmt: skip
MEMORISING = TuneOptions(num_virtual_tokens=8, steps=30, batch_size=20, learning_rate=0.1)


def noisy_labels() -> list[Row]:
    """Labels that can only be memorised."""
    labels = [row.label for row in ROWS]
    return [Row(row.text, label) for row, label in zip(ROWS, labels[3:] + labels[:3], strict=True)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "private.jsonl"
    path.write_text("\n".join(json.dumps({"text": row.text, "label": row.label}) for row in ROWS))
    return path


def test_lira_finds_memorised_rows_and_fewer_with_dp() -> None:
    arms = [Arm(MEMORISING, None), Arm(MEMORISING, PrivacyConfig(epsilon=1))]
    report = audit(tiny_model(layers=2), TASK, noisy_labels(), arms, AuditConfig(shadows=8, canaries=0))
    plain, private = report.attacks["without DP"][0], report.attacks["ε = 1"][0]
    assert plain.p_value < 0.02
    assert plain.auc.value > plain.chance[1]
    assert private.auc.value < plain.auc.value
    assert not report.findings


def test_the_report_agrees_in_json_table_and_figure() -> None:
    config = TuneOptions(num_virtual_tokens=4, steps=3, batch_size=6)
    arms = [Arm(config, None), Arm(config, PrivacyConfig(epsilon=8))]
    stages: set[str] = set()
    report = audit(
        tiny_model(layers=2), TASK, ROWS, arms, AuditConfig(shadows=4), on_progress=lambda each: stages.add(each.stage)
    )
    assert {"shadow prompts ε = 8", "scores ε = 8", "canaries", "scores"} <= stages, "every long stage reports progress"
    document, table = json.loads(to_json(report)), to_markdown(report)
    assert [(each["arm"], each["variant"]) for each in document["lira"]] == [
        ("without DP", "online"), ("without DP", "offline"), ("ε = 8", "online"), ("ε = 8", "offline"),
    ]  # fmt: skip
    for each in document["lira"]:
        assert f"{each['auc']['value']:.3f} ({each['auc']['low']:.3f}–{each['auc']['high']:.3f})" in table
        assert set(each["true_positives"]) == {"0.001", "0.01"}
    assert [each["kind"] for each in document["one_run"]] == ["data", "gradient"]
    assert all(each["claimed"] == 8 and each["evidence"]["canaries"] == 20 for each in document["one_run"])
    assert "PRIVATE" in table
    assert "PRIVATE" in document["private"]
    assert not any(row.text in to_json(report) for row in ROWS), "figures but no rows"
    assert to_picture(report).startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [{"shadows": -1}, {"canaries": -1}, {"shadows": 0, "canaries": 0}, {"confidence": 1}])
def test_a_config_that_audits_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidInput):
        AuditConfig(**wrong)


# --- the command --------------------------------------------------------------------------------------


def options(student: Path, data: Path) -> list[object]:
    small = ["--steps", 4, "--batch-size", 6, "--num-virtual-tokens", 4, "--max-length", 32]
    return ["audit", "--student", student, "--data", data, "--task", "sst2", "--shadows", 4, *small]


def test_post_audit_prints_a_table_writes_json_and_figure_and_sends_nothing(
    student: Path, data: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an audit must not open connections")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    figures, plot = tmp_path / "a.json", tmp_path / "a.png"
    assert post(*options(student, data), "--json", figures, "--plot", plot) == 0
    printed = capsys.readouterr().out
    assert "PRIVATE" in printed
    assert len(re.findall(r"^\| (without DP|ε = 8), ", printed, re.M)) == 4
    assert len(json.loads(figures.read_text("utf-8"))["one_run"]) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert {path.stat().st_mode & 0o077 for path in (figures, plot)} == {0}, "readable by their owner only"


def test_either_arm_alone(student: Path, data: Path, capsys: Captured) -> None:
    assert post(*options(student, data), "--no-dp") == 0
    assert "ε = 8" not in capsys.readouterr().out
    assert post(*options(student, data), "--no-plain", "--shadows", 0, "--canaries", 12) == 0
    printed = capsys.readouterr().out
    assert "LiRA" not in printed
    assert "| 12 |" in printed


@pytest.mark.parametrize(
    "more",
    [
        ("--no-dp", "--epsilon", 8),
        ("--no-dp", "--canaries", 8),
        ("--no-dp", "--no-plain"),
        ("--shadows", 0, "--plot", "p.png"),
        ("--shadows", -1),
    ],
)
def test_options_that_conflict_are_refused(student: Path, data: Path, more: tuple[object, ...]) -> None:
    assert post(*options(student, data), *more) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--shadows", 3), "LiRA needs"),
        (("--canaries", 21), "canaries for 40 rows"),
        (("--epsilon", 0), "epsilon is 0"),
        (("--delta", 0.5), "delta"),
        (("--data", "nothing.jsonl"), "no such file"),
        (("--json", "."), "folder"),
    ],
)
def test_bad_input_is_explained(
    student: Path, data: Path, capsys: Captured, more: tuple[object, ...], message: str
) -> None:
    assert post(*options(student, data), *more) == 1
    assert message in capsys.readouterr().err


def test_ctrl_c_stops_between_two_steps_and_says_how_to_resume(
    student: Path, data: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "stop_gently", lambda: nullcontext(lambda: True))
    assert post(*options(student, data), "--checkpoint", tmp_path / "state") == 130
    assert "resumes from" in capsys.readouterr().err
    assert (tmp_path / "state" / "plain" / "shadows" / "0" / "checkpoint.safetensors").exists()
    assert post(*options(student, data)) == 130
    assert "nothing was saved" in capsys.readouterr().err


def test_a_killed_audit_resumes(student: Path, data: Path, tmp_path: Path, capsys: Captured) -> None:
    """kill -9 after the plain shadow prompts: they aren't tuned again."""
    state = tmp_path / "state"
    arguments = [str(each) for each in (*options(student, data), "--canaries", 0, "--checkpoint", state)]
    plain = state / "plain" / "shadows" / "0" / "checkpoint.safetensors"
    code = "import sys; from post_shared.cli.app import build_app, run; sys.exit(run(build_app(), sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    while process.poll() is None and not plain.exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = load(plain.read_bytes())
    assert post(*arguments) == 0
    assert "ε = 8" in capsys.readouterr().out
    after = load(plain.read_bytes())
    assert all((before[name] == after[name]).all() for name in before)
