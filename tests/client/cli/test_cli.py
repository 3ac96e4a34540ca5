"""The command line: exit codes, one clear line for every mistake, results on stdout and everything else on stderr."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import EntryPoint, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from post_client import console
from post_client.tuning import tune as tuning
from post_shared.cli.app import GROUP, build_app, run
from post_shared.engine.precision import Precision
from post_shared.files.model_folder import manifest, model_hash
from post_shared.files.prompt_file import read_prompt
from tests.client.terminal import Captured, post
from tests.models import LABELS, TEXTS
from tests.server.http_harness import HttpHarness, prompt_bytes


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "private.jsonl"
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)] * 4
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.safetensors"
    path.write_bytes(prompt_bytes("ab" * 32, dp=True))
    return path


# --- help, version, errors ----------------------------------------------------------------------------


def test_help_and_version_need_no_torch() -> None:
    code = """
import sys
from post_shared.cli.app import build_app, run
assert run(build_app(), ["--help"]) == 0
assert run(build_app(), ["tune", "--help"]) == 0
assert run(build_app(), ["--version"]) == 0
assert run(build_app(), []) == 2
heavy = {"torch", "transformers", "opacus", "matplotlib", "fastapi", "celery"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"post {version('post-transfer')}" in done.stdout


def test_a_swallowed_ctrl_c_takes_effect_at_the_next_change(capsys: Captured) -> None:
    """A library can swallow a KeyboardInterrupt."""
    previous = signal.getsignal(signal.SIGINT)

    class Job:
        id, document = "job_1", SimpleNamespace(kind="distil")

        def wait(self, progress: Callable[[object], None]) -> None:
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            progress(self.document)

    with pytest.raises(typer.Exit) as stopped:
        console.follow(Job())  # type: ignore[arg-type]
    assert stopped.value.exit_code == 130
    assert "post jobs cancel job_1" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is previous


def test_every_command_has_help(capsys: Captured) -> None:
    commands = ["pull", "tune", "audit", "push", "transfer", "predict", "distil", "report", "evaluate", "jobs", "demo"]
    commands += ["serve", "model", "dataset", "key", "ledger", "accountant"]
    for command in commands:
        assert post(command, "--help") == 0
    assert all(command in capsys.readouterr().out or post("--help") == 0 for command in commands)


def test_every_command_argument_and_option_has_help() -> None:
    commands = list(_commands(typer.main.get_command(build_app()), "post"))
    assert len(commands) > 30
    undocumented = [name for name, command in commands if not command.help]
    undocumented += [
        f"{name} {parameter.human_readable_name}"
        for name, command in commands
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert undocumented == []


def test_the_help_of_tune_shows_its_true_defaults(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    from post_shared.schemas.tuning import PLAIN, PRIVATE

    monkeypatch.setenv("COLUMNS", "300")
    assert post("tune", "--help") == 0
    shown = capsys.readouterr().out
    for name in ("steps", "batch_size", "learning_rate"):
        assert f"default: {getattr(PRIVATE, name)}, or {getattr(PLAIN, name)} with --no-dp" in shown


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child_name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, f"{name} {child_name}")


def test_help_says_how_to_install_a_missing_side(capsys: Captured) -> None:
    sides = [
        EntryPoint("client", "post_client.cli:register", GROUP),
        EntryPoint("server", "no_such_module_anywhere:register", GROUP),
    ]
    assert run(build_app(sides), ["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "pip install 'post-transfer[server]'" in shown
    assert "post-transfer[client]" not in shown
    assert run(build_app(sides), ["serve"]) == 2
    assert run(build_app(sides), ["tune", "--help"]) == 0


def test_an_unexpected_error_is_one_line_too(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POST_DEBUG", raising=False)
    app = build_app([])

    @app.command()
    def broken() -> None:
        raise ZeroDivisionError("oh")

    @app.command()
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run(app, ["broken"]) == 1
    assert capsys.readouterr().err.startswith("error: ZeroDivisionError: oh")
    assert run(app, ["interrupted"]) == 130
    monkeypatch.setenv("POST_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run(app, ["broken"])


# --- mistakes -----------------------------------------------------------------------------------------

USAGE = [
    ("nonsense",),
    ("tune",),
    ("tune", "--student", "s", "--data", "d", "--out", "o"),
    ("tune", "--student", "s", "--data", "d", "--out", "o", "--task", "sst2", "--template", "{text}"),
    ("tune", "--student", "s", "--data", "d", "--out", "o", "--task", "sst2", "--no-dp", "--epsilon", "8"),
    ("tune", "--student", "s", "--data", "d", "--out", "o", "--task", "sst2", "--steps", "0"),
    ("tune", "--student", "s", "--data", "d", "--out", "o", "--task", "sst2", "--epsilon", "much"),
    ("tune", "--student", "s", "--data", "d", "--out", "o", "--template", "{text}", "--label-word", "good"),
    ("tune", "--student", "s", "--data", "d", "--out", "o", "--task", "sst2", "--label-word", "a=b"),
    ("tune", "--student", "s", "--data", "d", "--out", "o", "--template", "{text}", *["--label-word", "a=b"] * 2),
    ("push",),
    ("transfer", "--prompt", "p", "--target", "t", "--dataset", "d", "--alpha", "most"),
    ("predict", "--model", "m", "--prompt", "p"),
    ("predict", "--model", "m", "--prompt", "p", "--text", "x", "--data", "d"),
    ("predict", "--model", "m", "--text", "x"),
    ("predict", "--model", "m", "--prompt", "p", "--task", "sst2", "--text", "x"),
    ("distil", "--target", "t", "--corpus", "c", "--name", "n"),
    ("distil", "--target", "t", "--corpus", "c", "--name", "n", "--steps", "1", "--keep-layers", "a,b"),
    ("evaluate", "--model", "m", "--dataset", "d"),
    ("jobs", "list", "--state", "sleeping"),
    ("jobs",),
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_an_invalid_command_line_exits_with_2(arguments: tuple[str, ...], capsys: Captured) -> None:
    assert post(*arguments) == 2
    assert capsys.readouterr().out == "" or arguments == ("jobs",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--task": "no-such"}, "no preset task 'no-such'"),
        ({"--task": "no-such.json"}, "no-such.json"),
        ({"--student": "nowhere"}, "nowhere"),
        ({"--data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"--text-column": "review"}, "review"),
        ({"--label-column": "stars"}, "stars"),
        ({"--epsilon": "-1"}, "epsilon"),
        ({"--epsilon": "nan"}, "epsilon"),
        ({"--delta": "0.5"}, "delta"),
        ({"--max-grad-norm": "0"}, "clipping"),
        ({"--device": "cuda:77"}, "cuda"),
        ({"--device": "toaster"}, "toaster"),
        ({"--out": "/proc/prompt"}, "/proc/prompt"),
        ({"--max-length": "1000"}, "positions"),
    ],
)
def test_a_mistake_in_tuning_is_one_line(
    change: dict[str, str], message: str, student: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    options = {"--student": student, "--data": data, "--out": tmp_path / "p", "--task": "sst2", "--steps": 2}
    assert post("tune", *[argument for pair in (options | change).items() for argument in pair]) == 1
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert shown.out == ""
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x04pickle", b"\xff" * 8 + b"{}"])
def test_a_file_that_is_not_a_prompt_is_not_pushed(content: bytes, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "p").write_bytes(content)
    assert post("push", tmp_path / "p", "--yes", "--url", "http://127.0.0.1:1") == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'p'}: ")
    assert post("push", tmp_path / "absent") == 1
    assert "absent" in capsys.readouterr().err


def test_a_missing_server_address_is_one_line(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POST_URL", raising=False)
    monkeypatch.setenv("POST_API_KEY", "post_x")
    assert post("jobs", "list") == 1
    assert "POST_URL" in capsys.readouterr().err


# --- tune and push ------------------------------------------------------------------------------------


def tune(student: Path, data: Path, output: Path, *more: object) -> int:
    small = ("--steps", 3, "--batch-size", 4, "--num-virtual-tokens", 2)
    return post("tune", "--student", student, "--data", data, "--out", output, "--task", "sst2", *small, *more)


@pytest.mark.parametrize("more", [["--no-dp"], ["--epsilon", "8"]])
def test_only_without_privacy_a_student_may_compute_in_16_bits(
    more: list[str], student: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "post_shared.model.language_model.choose_precision", lambda *_: Precision(torch.bfloat16, "a test")
    )
    dtypes: list[torch.dtype] = []
    plan_tuning = tuning.plan_tuning
    monkeypatch.setattr(
        tuning, "plan_tuning", lambda model, *a, **k: dtypes.append(model.dtype) or plan_tuning(model, *a, **k)
    )
    assert tune(student, data, tmp_path / "p", *more) == 0
    assert dtypes == [torch.bfloat16 if more == ["--no-dp"] else torch.float32]
    assert read_prompt((tmp_path / "p").read_bytes()).length == 2


def test_without_a_guarantee_there_is_a_clear_warning(
    student: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert tune(student, data, tmp_path / "p", "--no-dp") == 0
    shown = capsys.readouterr()
    assert "NO PRIVACY GUARANTEE" in shown.err
    assert "NO PRIVACY GUARANTEE" in shown.out
    prompt = read_prompt((tmp_path / "p").read_bytes())
    assert (prompt.epsilon, prompt.length, prompt.width) == (None, 2, 32)
    assert prompt.model_hash == model_hash(manifest(student))
    assert (tmp_path / "p").stat().st_mode & 0o077 == 0


def test_privacy_is_the_default_and_its_statement_is_shown(
    student: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert tune(student, data, tmp_path / "p", "--statement", tmp_path / "s.json") == 0
    shown = capsys.readouterr()
    prompt = read_prompt((tmp_path / "p").read_bytes())
    assert prompt.epsilon == 8.0
    assert prompt.delta is not None
    assert "differentially private" in shown.out
    assert "GUARANTEE" not in shown.err
    assert json.loads((tmp_path / "s.json").read_text())["private"] is True


def test_json_is_one_document(student: Path, data: Path, tmp_path: Path, capsys: Captured) -> None:
    words = ("--label-word", "positive=good,great", "--label-word", "negative=bad")
    small = ("--steps", 2, "--batch-size", 4, "--num-virtual-tokens", 2, "--epsilon", 3)
    arguments = ("--student", student, "--data", data, "--out", tmp_path / "p", "--template", "{text}, it was")
    assert post("tune", *arguments, *words, *small, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["statement"]["epsilon"] == 3
    prompt = read_prompt((tmp_path / "p").read_bytes())
    assert prompt.task.label_words == {"positive": ["good", "great"], "negative": ["bad"]}
    assert shown["bytes"] == (tmp_path / "p").stat().st_size


def test_dry_run_writes_the_exact_request_and_sends_nothing(
    prompt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    from post_client import build_upload

    monkeypatch.delenv("POST_URL", raising=False)
    monkeypatch.delenv("POST_API_KEY", raising=False)
    assert post("push", prompt, "--dry-run", tmp_path / "request") == 0
    assert (tmp_path / "request").read_bytes() == build_upload(read_prompt(prompt.read_bytes())).to_bytes()
    assert (tmp_path / "request").read_bytes().endswith(prompt.read_bytes())
    assert f"{tmp_path / 'request'} contains the request" in capsys.readouterr().err


def test_push_shows_what_will_leave_and_asks(
    http_harness: HttpHarness, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, student = http_harness.add_pair()
    (tmp_path / "p").write_bytes(prompt_bytes(student.hash, dp=True))
    monkeypatch.setenv("POST_URL", http_harness.url)
    monkeypatch.setenv("POST_API_KEY", http_harness.keys["alice"])
    before = http_harness.everything()
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no answer
    assert post("push", tmp_path / "p") == 1
    shown = capsys.readouterr().err
    for fact in (student.hash, "{text}, it was", "positive", "(8, 1e-05)", "Nothing else"):
        assert fact in shown
    assert "Use --yes to send without asking" in " ".join(shown.split())
    assert http_harness.everything() == before
    assert post("push", tmp_path / "p", "--yes") == 0
    prompt_id = capsys.readouterr().out.strip()
    assert post("push", tmp_path / "p", "--yes", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"]["id"] == prompt_id


@pytest.mark.parametrize("interruption", [EOFError, KeyboardInterrupt])
def test_ctrl_c_at_a_question_is_not_an_answer(
    interruption: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    class InterruptedInput(io.StringIO):
        def readline(self, size: int | None = -1) -> str:
            raise interruption

    monkeypatch.setattr("sys.stdin", InterruptedInput())
    if interruption is EOFError:
        assert console.confirm("Continue?", default=True) is None
    else:
        with pytest.raises(KeyboardInterrupt):
            console.confirm("Continue?", default=True)


# --- commands that need a server, without workers -------------------------------------------------------


def test_transfer_can_be_left_running_watched_and_cancelled(
    http_harness: HttpHarness, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, student = http_harness.add_pair()
    http_harness.add_dataset("public")
    (tmp_path / "p").write_bytes(prompt_bytes(student.hash))
    monkeypatch.setenv("POST_URL", http_harness.url)
    monkeypatch.setenv("POST_API_KEY", http_harness.keys["alice"])
    post("push", tmp_path / "p", "--yes")
    prompt_id = capsys.readouterr().out.strip()
    assert post("transfer", "--prompt", prompt_id, "--target", target.name, "--dataset", "public", "--no-wait") == 0
    job = capsys.readouterr().out.strip()
    assert post("jobs", "list", "--json") == 0
    assert [each["id"] for each in json.loads(capsys.readouterr().out)] == [job]
    assert post("jobs", "show", job) == 0
    assert "queued" in capsys.readouterr().out
    assert post("jobs", "cancel", job) == 0
    assert "has already ended" not in capsys.readouterr().err
    assert post("jobs", "cancel", job) == 0
    assert "has already ended: cancelled" in capsys.readouterr().err
    assert post("jobs", "watch", job) == 1
    assert f"{job} was cancelled" in capsys.readouterr().err
    assert post("jobs", "show", "job_nothing") == 1


def test_pull_downloads_and_verifies(
    http_harness: HttpHarness, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, student = http_harness.add_pair()
    monkeypatch.setenv("POST_URL", http_harness.url)
    monkeypatch.setenv("POST_API_KEY", http_harness.keys["alice"])
    assert post("pull", "small", "--to", tmp_path / "student", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["hash"] == student.hash
    assert "already" not in shown.err
    assert post("pull", "small", "--to", tmp_path / "student", "--json") == 0
    again = capsys.readouterr()
    assert again.out == shown.out
    assert f"{tmp_path / 'student'} already contains this student (verified)" in again.err
    assert post("pull", "small", "--to", tmp_path / "other", "--hash", "0" * 64) == 1
    assert post("pull", "large", "--to", tmp_path / "other") == 1
    assert not (tmp_path / "other").exists()


def test_predict_refuses_unusable_input_before_sending_texts(
    http_harness: HttpHarness, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, student = http_harness.add_pair()
    (tmp_path / "p").write_bytes(prompt_bytes(student.hash))
    (tmp_path / "rows.jsonl").write_text('{"text": "fine", "label": "sideways"}\n')
    (tmp_path / "good.jsonl").write_text('{"text": "fine", "label": "positive"}\n')
    monkeypatch.setenv("POST_URL", http_harness.url)
    monkeypatch.setenv("POST_API_KEY", http_harness.keys["alice"])
    post("push", tmp_path / "p", "--yes")
    prompt_id = capsys.readouterr().out.strip()
    monkeypatch.setattr("post_client.resources.predictions.Predictions.create", lambda *_, **__: pytest.fail("sent"))
    predict = ("predict", "--model", target.name)
    assert post(*predict, "--prompt", prompt_id, "--data", tmp_path / "rows.jsonl") == 1
    shown = capsys.readouterr().err
    assert "sideways" in shown
    assert "Nothing was sent" in shown
    assert "source prompt" in shown
    assert post(*predict, "--prompt", prompt_id, "--data", tmp_path / "good.jsonl", "--label-column", "nope") == 1
    assert "no labels in column 'nope'" in capsys.readouterr().err
    assert post(*predict, "--task", "sst2", "--data", tmp_path / "rows.jsonl") == 1
    assert post(*predict, "--task", "sst2", "--data", tmp_path / "good.jsonl", "--out", "/proc/x.jsonl") == 1
    assert "/proc/x.jsonl" in capsys.readouterr().err


def test_a_private_run_with_public_texts_warns_of_private_ones_among_them(
    student: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    public = tmp_path / "public.jsonl"
    public.write_text("\n".join(json.dumps({"text": f"{text} {at}"}) for text in TEXTS for at in range(3)))
    shared = sum(json.loads(line)["text"] == TEXTS[0] for line in data.read_text().splitlines())
    assert tune(student, data, tmp_path / "p", "--public", public) == 0
    shown = capsys.readouterr()
    assert "private rows are also in" not in shown.err
    assert "no private text may be among them" in shown.out
    assert "BUT" not in shown.out
    assert tune(student, data, tmp_path / "p", "--public", data) == 2, "the private file itself"
    with public.open("a") as file:
        file.write("\n" + json.dumps({"text": f" {TEXTS[0].upper()}\t"}))
    capsys.readouterr()
    assert tune(student, data, tmp_path / "p2", "--public", public) == 0
    shown = capsys.readouterr()
    assert f"The texts of {shared} private rows are also in" in shown.err
    assert "BUT" in shown.out
    assert f"include the texts of {shared} private rows" in shown.out
    public.write_text(json.dumps({"text": "one"}))
    assert tune(student, data, tmp_path / "p3", "--public", public) == 1
    assert "public.jsonl has 1 different texts" in capsys.readouterr().err
