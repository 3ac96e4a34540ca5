"""The benchmarks run; what they measure is for people to read."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
from benchmarks import audit_runs
from benchmarks.distil_speed import CLOCKS, RECIPES, draw, first_reach, result, run, table
from benchmarks.dp_cost import LABEL_WORDS, measure, measure_runs, reviews
from benchmarks.dp_memory import private_steps

from post_shared.data.batches import Batch
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.engine.memory_profiler import peak_bytes
from post_shared.schemas.tuning import TuneOptions
from tests.models import TEXTS, tiny_model

TASK = Task("{text}, it was", LABEL_WORDS)


def test_dp_cost_runs() -> None:
    result = measure(tiny_model(), batch_size=4, steps=2, length=5)
    assert set(result) == {"plain_seconds", "private_seconds", "ratio"}
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    assert measure_runs(tiny_model(), batch_size=4, steps=2, length=5, rounds=1) > 0


def test_distil_speed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at this clock is a second."""
    monkeypatch.setitem(CLOCKS, "wall", partial(next, itertools.count()))
    runs = run(
        tiny_model(layers=6),
        [" ".join(TEXTS)] * 200,
        layers=3,
        pattern="front",
        forms=["{text} It was"],
        length=32,
        seconds=10,
        slice_seconds=4,
    )
    assert set(runs) == set(RECIPES)
    for one in runs.values():
        assert one.steps > 0
        assert len(one.curve) > 1
        assert all(math.isfinite(loss) for _, loss in one.curve)
    found = result(runs)
    assert "paper_seconds" in found
    assert table(found, runs).count("\n") == 2 + len(RECIPES)
    draw(runs, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 0


def test_the_time_to_a_loss_lies_between_two_measurements() -> None:
    curve = [(0.0, 4.0), (10.0, 2.0), (20.0, 1.0)]
    assert first_reach(curve, 5.0) == 0.0
    assert first_reach(curve, 3.0) == 5.0
    assert first_reach(curve, 1.0) == 20.0
    assert first_reach(curve, 0.5) is None


@pytest.mark.parametrize("micro", [1, 16])
def test_a_private_step_takes_the_memory_of_its_micro_batch(micro: int) -> None:
    """Of short rows more run at a time, in no more than the room of the longest; and few wait to go back together."""
    model = tiny_model(layers=2)
    words = " ".join(["a film"] * 80)
    rows = [Row(words, "positive"), Row("a plot", "negative")] * 128
    step, all_rows = private_steps(model, rows, micro=micro, length=4, longest=TuneOptions().max_length)
    longest = Batch(all_rows.encoded, tuple(range(0, 2 * micro, 2)))
    one = peak_bytes(lambda: step(longest))
    assert peak_bytes(lambda: step(all_rows)) <= 1.3 * one
    assert peak_bytes(lambda: step(Batch(all_rows.encoded, tuple(range(1, 256, 2))))) <= 1.3 * one


def test_a_large_logical_batch_takes_the_memory_of_its_micro_batch() -> None:
    """A law, not a time: 4,096 rows in micro-batches of 256 hold no more tensors at once than 256 rows do."""
    model = tiny_model(layers=1)
    rows = [Row("a film", "positive"), Row("a plot", "negative")] * 2048
    step, all_rows = private_steps(model, rows, micro=256, length=4)
    small = peak_bytes(lambda: step(all_rows.split(256)[0]))
    large = peak_bytes(lambda: step(all_rows))
    step, all_rows = private_steps(model, rows[:1024], micro=1024, length=4)
    whole = peak_bytes(lambda: step(all_rows))
    assert large <= 1.1 * small
    assert whole > 2 * small, "the measure sees memory that grows"


def test_audit_runs_runs() -> None:
    config = TuneOptions(num_virtual_tokens=4, steps=3, batch_size=8)
    result = audit_runs.measure(tiny_model(), TASK, reviews(40), config, epsilon=8.0, runs=3, canaries=10)
    assert {kind: len(some) for kind, some in result["bounds"].items()} == {"data": 3, "gradient": 3}
    assert set(result["not_refuted"]) == {"data", "gradient"}
