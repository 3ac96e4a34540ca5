"""Each fault of the chaos benchmark once, at a moment of its own: what holds for many runs holds for one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.chaos import PHASES, Chaos, Found, Plan, main, summary
from benchmarks.chaos_stage import FAULTS, ChaosStage

MOMENTS = {
    "kill worker": ("distil", "distil"),
    "kill job": ("transfer", "transfer"),
    "kill Redis": ("distil", "ordered"),
    "restart Redis": ("transfer", "loading"),
    "kill API": ("distil", "start"),
    "pause worker": ("transfer", "transfer"),
    "hang job": ("distil", "distil"),
    "deliver again": ("transfer", "precompute"),
    "fill disk": ("distil", "loading"),
    "cut power": ("distil", "late"),
}


@pytest.fixture(scope="module")
def chaos() -> Iterator[Chaos]:
    with tempfile.TemporaryDirectory(prefix="post-") as folder:
        stage = ChaosStage(Path(folder))
        try:
            yield Chaos(stage)
        finally:
            stage.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_nothing(chaos: Chaos, fault: str) -> None:
    if fault == "fill disk" and not chaos.stage.small_disk:
        pytest.skip("no small disk can be mounted here")
    kind, phase = MOMENTS[fault]
    found = chaos.run(Plan(0, kind, phase, fault, 0.1, "0:0:in"))
    assert not found.problems, chaos.stage.log()


def test_a_number_is_always_the_same_run() -> None:
    plans = [Plan.draw(7, number) for number in range(100)]
    assert plans == [Plan.draw(7, number) for number in range(100)]
    assert {plan.fault for plan in plans} == set(FAULTS)
    assert {(plan.kind, plan.phase) for plan in plans} == {(kind, each) for kind in PHASES for each in PHASES[kind]}
    assert plans != [Plan.draw(8, number) for number in range(100)]


def test_what_was_played_is_not_played_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file tells which runs there were; a run that found something makes the exit status 1."""
    runs = [Found(Plan.draw(3, number), seen="running distil 0.50", attempts=1) for number in range(2)]
    file = tmp_path / "all.json"
    for status in (0, 1):
        documents = [run.document() for run in runs]
        file.write_text(json.dumps({"seed": 3, "runs": documents, "summary": summary(documents)}))
        assert main(["--runs", "2", "--seed", "3", "--json", str(file)]) == status
        assert json.loads(capsys.readouterr().out)["runs"] == 2
        runs[1].problems.append("it ended 2 times")
