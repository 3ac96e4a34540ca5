"""``post demo --fast``: the real server, broker, worker and predictor; only the model is tiny."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.server.server_harness import processes_in, wait_for

MEMBERS = (
    "zero_shot calibrated prompted_student direct_reuse post prompted_student_dp post_dp upper_bound epsilon delta "
    "n_private_test seconds bytes_uploaded versions seed"
)
ACCURACIES = (
    "zero_shot",
    "calibrated",
    "prompted_student",
    "direct_reuse",
    "post",
    "prompted_student_dp",
    "post_dp",
    "upper_bound",
)


def start(folder: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    """Start ``post demo --fast`` in ``folder``, which also gets its temporary files."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("POST_")}
    return subprocess.Popen(
        [sys.executable, "-m", "post_shared.cli.app", "demo", "--fast", "--results", "r.json", *more],
        cwd=folder,
        env=inherited | {"TMPDIR": str(folder)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("d")


def test_the_fast_demo_completes(folder: Path) -> None:
    # The demo must ignore a real database in the environment.
    demo = start(folder, "--upper-bound", "--seed", "3", POST_DATABASE_URL="postgresql://nowhere.invalid/real")
    stdout, stderr = demo.communicate(timeout=240)
    assert demo.returncode == 0, stderr
    results = json.loads((folder / "r.json").read_text())
    assert list(results) == MEMBERS.split()
    assert all(0 <= results[name] <= 1 for name in ACCURACIES)
    assert (results["epsilon"], results["seed"], results["n_private_test"]) == (8.0, 3, 64)
    assert 0 < results["delta"] < 1 / 240
    assert {"distil", "tune", "tune_dp", "transfer", "transfer_dp"} <= set(results["seconds"])
    assert results["bytes_uploaded"] > 2 * 4 * 64 * 4  # two prompts of 4 vectors of width 64
    assert (folder / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "POST" in stdout
    assert sorted(path.name for path in folder.iterdir()) == ["r.json", "r.png"], "the run's folder is removed"


@pytest.mark.slow
def test_a_failure_shows_the_servers_log_and_keeps_the_folder(folder: Path) -> None:
    demo = start(folder, POST_DEVICE="cuda:99")  # there is no such device, so the jobs fail
    _, stderr = demo.communicate(timeout=240)
    assert demo.returncode == 1
    assert "cuda:99" in stderr
    assert "The end of the server's log" in stderr
    assert len([line for line in stderr.splitlines() if "error:" in line]) >= 1
    (run_folder,) = folder.glob("post-demo-*")
    assert str(run_folder) in stderr
    assert processes_in(run_folder / "provider") == []
    assert not (folder / "r.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_stops_the_demo_and_leaves_nothing_behind(number: signal.Signals, folder: Path) -> None:
    demo = start(folder)
    home = wait_for(lambda: next(folder.glob("post-demo-*/provider/serve.json"), None), 120)
    assert processes_in(home.parent) != []
    demo.send_signal(number)
    demo.communicate(timeout=60)
    assert demo.returncode == 130
    time.sleep(0.2)
    assert processes_in(home.parent) == []
    assert list(folder.iterdir()) == []
