"""Each fault of the chaos benchmark once, in a different phase."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.chaos import PHASES, Chaos, Outcome, Plan, main, summary
from benchmarks.chaos_stage import FAULTS, ChaosStage

PHASE_OF_FAULT = {
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
def test_a_fault_does_not_change_the_result(chaos: Chaos, fault: str) -> None:
    if fault == "fill disk" and not chaos.stage.small_disk:
        pytest.skip("no small disk can be mounted here")
    kind, phase = PHASE_OF_FAULT[fault]
    outcome = chaos.run(Plan(0, kind, phase, fault, 0.1, "0:0:in"))
    assert not outcome.problems, chaos.stage.log()


def test_a_run_is_determined_by_its_number() -> None:
    plans = [Plan.draw(7, number) for number in range(100)]
    assert plans == [Plan.draw(7, number) for number in range(100)]
    assert {plan.fault for plan in plans} == set(FAULTS)
    assert {(plan.kind, plan.phase) for plan in plans} == {(kind, phase) for kind in PHASES for phase in PHASES[kind]}
    assert plans != [Plan.draw(8, number) for number in range(100)]


def test_recorded_runs_are_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file lists the runs so far; a run with problems makes the exit status 1."""
    runs = [Outcome(Plan.draw(3, number), seen="running distil 0.50", attempts=1) for number in range(2)]
    file = tmp_path / "all.json"
    for status in (0, 1):
        documents = [run.document() for run in runs]
        file.write_text(json.dumps({"seed": 3, "runs": documents, "summary": summary(documents)}))
        assert main(["--runs", "2", "--seed", "3", "--json", str(file)]) == status
        assert json.loads(capsys.readouterr().out)["runs"] == 2
        runs[1].problems.append("it ended 2 times")
