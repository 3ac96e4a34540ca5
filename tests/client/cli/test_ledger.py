"""``post tune`` with its ledger, ``post ledger`` and ``post accountant``: charges, refusals and output."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from post_client.ledger.budget import WITHOUT_PRIVACY
from post_client.privacy import DEFAULT_DELTA, Mechanism, PrivacyConfig, PrivacyPlan, compose
from post_client.students.download import student_hash
from post_shared.errors import InvalidInput
from tests.client.terminal import Captured, post
from tests.models import LABELS, TEXTS


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return _write(tmp_path / "private.jsonl", 4)


def _write(path: Path, times: int, mark: str = "") -> Path:
    rows = [
        {"text": f"{text} {at}{mark}", "label": label, "who": f"user {at}"}
        for at in range(times)
        for text, label in zip(TEXTS, LABELS, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def tune(student: Path, data: Path, *more: object) -> int:
    small = ("--steps", 3, "--batch-size", 4, "--num-virtual-tokens", 2, "--out", data.parent / "p")
    return post("tune", "--student", student, "--data", data, "--task", "sst2", *small, *more)


def ledger(capsys: Captured, *arguments: object) -> list[dict[str, object]]:
    capsys.readouterr()
    assert post("ledger", *arguments, "--json") == 0
    accounts: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return accounts


def test_a_cap_below_the_spent_budget_is_explained_once(student: Path, data: Path, capsys: Captured) -> None:
    assert tune(student, data, "--no-dp") == 0
    capsys.readouterr()
    assert tune(student, data, "--epsilon", 3, "--epsilon-cap", 4, "--force") == 1
    refusal = " ".join(capsys.readouterr().err.split())
    assert refusal.count(WITHOUT_PRIVACY) == 1
    assert "in 1 run already, and the cap is 4" in refusal


def test_runs_add_up_until_the_cap_and_pushing_is_free(student: Path, data: Path, capsys: Captured) -> None:
    assert tune(student, data, "--epsilon", 3, "--epsilon-cap", 3.7, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run"] == {"id": 1, "resumed": False}
    assert result["spent"]["epsilon"] == result["statement"]["epsilon_spent"] <= 3
    assert post("push", data.parent / "p", "--dry-run", data.parent / "request") == 0
    prompt = (data.parent / "p").read_bytes()
    assert tune(student, data, "--epsilon", 3) == 1, "the prompt would be overwritten"
    assert "p already exists" in capsys.readouterr().err
    assert (data.parent / "p").read_bytes() == prompt
    assert len(ledger(capsys)[0]["runs"]) == 1, "nothing was charged"  # type: ignore[arg-type]
    assert tune(student, data, "--epsilon", 3, "--force") == 0
    assert "in 2 runs for a row of private.jsonl" in capsys.readouterr().out
    (account,) = ledger(capsys)
    assert account["epsilon_cap"] == 3.7
    assert [each["state"] for each in account["runs"]] == ["finished", "finished"]  # type: ignore[index]
    one = PrivacyPlan.make(PrivacyConfig(epsilon=3), 32, batch_size=4, steps=3).mechanism
    assert account["spent"]["epsilon"] == compose([one] * 2, DEFAULT_DELTA).epsilon  # type: ignore[index,list-item]
    before = (data.parent / "p").read_bytes()
    for options in (("--epsilon", 3), ("--no-dp",)):
        assert tune(student, data, *options, "--force") == 1
        refusal = capsys.readouterr().err
        assert "the cap is 3.7" in refusal
        assert "0:00:" not in refusal, "no progress bar for a refused run"
    assert (data.parent / "p").read_bytes() == before
    assert ledger(capsys, "--data", data, "--epsilon-cap", 50)[0]["epsilon_cap"] == 50
    assert tune(student, data, "--epsilon", 3, "--force") == 0
    assert post("ledger") == 0
    assert "cap 50" in capsys.readouterr().out
    assert post("ledger", "--epsilon-cap", 5) == 2


def test_a_statement_without_its_prompt_does_not_block_a_retry(
    student: Path, data: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_until_full(path: Path, content: bytes) -> None:
        if path.name == "p":
            raise InvalidInput(f"{path}: can't write: no space")
        path.write_bytes(content)

    statement = data.parent / "s.json"
    with monkeypatch.context() as patched:
        patched.setattr(import_module("post_client.cli.tune"), "write_file", write_until_full)
        assert tune(student, data, "--statement", statement) == 1
    assert not statement.exists()
    capsys.readouterr()
    assert tune(student, data, "--statement", statement, "--json") == 0
    assert json.loads(capsys.readouterr().out)["run"] == {"id": 1, "resumed": True}
    (data.parent / "p").unlink()
    assert tune(student, data, "--statement", statement) == 1
    assert "s.json already exists" in capsys.readouterr().err


def test_epsilon_noise_and_what_a_second_run_would_add(student: Path, data: Path, capsys: Captured) -> None:
    assert post("accountant", "--units", 1000, "--epsilon", 4, "--steps", 50, "--batch-size", 20, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert 3.9 < figures["epsilon"] <= 4
    options = ("--noise", figures["noise_multiplier"], "--steps", 50, "--batch-size", 20)
    assert post("accountant", "--units", 1000, *options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == pytest.approx(figures["epsilon"], rel=1e-3)
    assert tune(student, data, "--epsilon", 3) == 0
    capsys.readouterr()
    second = ("accountant", "--data", data, "--noise", 1.5, "--steps", 10, "--batch-size", 8)
    assert post(*second, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    first = PrivacyPlan.make(PrivacyConfig(epsilon=3), 32, batch_size=4, steps=3).mechanism
    assert first is not None
    both = compose([first, Mechanism(1.5, 0.25, 10)], DEFAULT_DELTA).epsilon
    assert figures["spent_with_this_run"] == pytest.approx(both, abs=1e-4)
    assert figures["runs_so_far"] == 1
    assert len(ledger(capsys)[0]["runs"]) == 1  # type: ignore[arg-type]
    assert post(*second) == 0
    assert "spent with this run" in capsys.readouterr().out
    for wrong in (("--units", 10), ("--units", 10, "--noise", 1, "--epsilon", 1), ("--noise", 1)):
        assert post("accountant", *wrong) == 2
    for wrong in (("--noise", 0), ("--epsilon", -1), ("--noise", 1, "--delta", 0.5)):
        assert post("accountant", "--units", 10, *wrong) == 1


def test_a_student_changed_since_it_was_pulled_is_refused_at_no_cost(
    student: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    pulled_hash, copy = student_hash(student), tmp_path / "copy"
    shutil.copytree(student, copy)
    assert tune(copy, data, "--hash", pulled_hash) == 0
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    capsys.readouterr()
    assert tune(copy, data, "--hash", pulled_hash, "--force") == 1
    assert "it was changed since" in capsys.readouterr().err
    (account,) = ledger(capsys)
    assert len(account["runs"]) == 1  # type: ignore[arg-type]


def test_users_and_trials(student: Path, data: Path, tmp_path: Path, capsys: Captured) -> None:
    public = _write(tmp_path / "public.jsonl", 3, " in public")
    more = ("--user-column", "who", "--trials", 2, "--public", public, "--average-iterates", "--delta", 1e-3)
    assert tune(student, data, *more, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["statement"]["unit"].startswith("one user")
    assert result["statement"]["trials"] == len(result["trials"]) == 2
    (account,) = ledger(capsys, "--data", data, "--user-column", "who")
    assert (account["unit"], account["units"], account["rows"]) == ("user", 4, 32)
    assert b"user 1" not in (tmp_path / "p").read_bytes()
    assert tune(student, data, "--user-column", "nobody", "--force") == 1
    assert "no user column 'nobody'" in capsys.readouterr().err
    assert tune(student, data, "--trials", 2) == 2
    assert tune(student, data, "--no-dp", "--user-column", "who") == 2


@pytest.fixture
def at_step_two(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Runs a function after the second step of tuning."""

    def arrange(action: Callable[[], None]) -> None:
        from post_client.privacy import PromptDPSGD

        losses, update = [], PromptDPSGD.update

        def update_and_act(self: PromptDPSGD, *arguments: object) -> float | None:
            loss = update(self, *arguments)  # type: ignore[arg-type]
            losses.append(loss)
            if len(losses) == 2:
                action()
            return loss

        monkeypatch.setattr(PromptDPSGD, "update", update_and_act)

    return arrange


def test_ctrl_c_keeps_the_charge_and_the_same_command_resumes(
    student: Path, data: Path, capsys: Captured, at_step_two: Callable[[Callable[[], None]], None]
) -> None:
    at_step_two(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert tune(student, data) == 130
    assert "costs nothing more" in " ".join(capsys.readouterr().err.split())
    assert [each["state"] for each in ledger(capsys)[0]["runs"]] == ["interrupted"]  # type: ignore[attr-defined]
    assert not (data.parent / "p").exists()
    assert tune(student, data, "--json") == 0
    assert json.loads(capsys.readouterr().out)["run"] == {"id": 1, "resumed": True}
    assert [each["state"] for each in ledger(capsys)[0]["runs"]] == ["finished"]  # type: ignore[attr-defined]


def test_a_disk_that_fills_during_a_run_costs_no_budget_twice(
    student: Path, data: Path, capsys: Captured, at_step_two: Callable[[Callable[[], None]], None]
) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step_two(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard)))
    try:
        code = tune(student, data, "--checkpoint", data.parent / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    shown = capsys.readouterr().err
    assert "can't write" in shown
    assert "at no further cost" in " ".join(shown.split())
    (account,) = ledger(capsys)
    assert [each["state"] for each in account["runs"]] == ["interrupted"]  # type: ignore[attr-defined]
    assert tune(student, data, "--checkpoint", data.parent / "state") == 0
    assert ledger(capsys)[0]["spent"] == account["spent"]
    assert (data.parent / "p").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ledger", "/proc/ledger.db"), "/proc/ledger.db"),
        (("--epsilon", 0), "epsilon"),
        (("--epsilon", -2), "epsilon"),
        (("--delta", 1 / 32), "1/32"),
        (("--epsilon-cap", "-1"), "cap"),
        (("--label-column", "who"), "label"),
    ],
)
def test_runs_that_can_not_be_accounted_for_are_not_trained(
    options: tuple[object, ...], message: str, student: Path, data: Path, capsys: Captured, own_ledger: Path
) -> None:
    assert tune(student, data, *options) == 1
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(shown) == 1
    assert message in shown[0]
    assert not (data.parent / "p").exists()
    assert ledger(capsys) == []


def test_an_empty_file_one_class_and_long_texts(student: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "one.jsonl").write_text('{"text": "a", "label": "positive"}\n' * 20)
    (tmp_path / "single.jsonl").write_text('{"text": "a", "label": "positive"}')
    wrong = (("empty.jsonl", "no rows"), ("one.jsonl", "all 20 rows have"), ("single.jsonl", "the only row has"))
    for name, message in wrong:
        assert tune(student, tmp_path / name) == 1
        assert f"{name}: {message}" in capsys.readouterr().err.replace("there are ", "")
    rows = [{"text": "film " * 500, "label": label} for label in LABELS] * 3
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert tune(student, tmp_path / "long.jsonl", "--max-length", 32) == 0, "long texts are truncated"
    assert len(ledger(capsys)) == 1
