"""The benchmarks run; their figures are for people to judge."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import audit_runs, sensitivity
from benchmarks.distil_speed import CLOCKS, RECIPES, draw, first_reach, result, run, table
from benchmarks.dp_cost import LABEL_WORDS, measure, measure_runs, reviews
from benchmarks.dp_memory import private_steps

from post_client.privacy.dp_optimizer import ROWS
from post_shared.data.batches import Batch
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.engine.memory_profiler import peak_bytes
from post_shared.method.tuning.tune import tuning_objective
from post_shared.schemas.tuning import TuneOptions
from tests.models import TEXTS, tiny_model

TASK = Task("{text}, it was", LABEL_WORDS)


def test_dp_cost_runs() -> None:
    result = measure(tiny_model(), batch_size=4, steps=2, length=5)
    assert set(result) == {"plain_seconds", "private_seconds", "ratio"}
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    assert measure_runs(tiny_model(), batch_size=4, steps=2, length=5, rounds=1) > 0


def test_distil_speed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reading of this clock is one second later."""
    monkeypatch.setitem(CLOCKS, "wall", partial(next, itertools.count()))
    runs = run(
        tiny_model(layers=6),
        [" ".join(TEXTS)] * 200,
        layers=3,
        pattern="front",
        templates=["{text} It was"],
        length=32,
        seconds=10,
        slice_seconds=4,
    )
    assert set(runs) == set(RECIPES)
    for recipe_run in runs.values():
        assert recipe_run.steps > 0
        assert len(recipe_run.curve) > 1
        assert all(math.isfinite(loss) for _, loss in recipe_run.curve)
    figures = result(runs)
    assert "paper_seconds" in figures
    assert table(figures, runs).count("\n") == 2 + len(RECIPES)
    draw(runs, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 0


def test_the_time_to_a_loss_lies_between_two_measurements() -> None:
    curve = [(0.0, 4.0), (10.0, 2.0), (20.0, 1.0)]
    assert first_reach(curve, 5.0) == 0.0
    assert first_reach(curve, 3.0) == 5.0
    assert first_reach(curve, 1.0) == 20.0
    assert first_reach(curve, 0.5) is None


def test_a_large_logical_batch_takes_the_memory_of_its_longest_row() -> None:
    """Rows run one after the other; only gradients wait, a bounded number of them."""
    model = tiny_model(layers=2)
    rows = [Row(" ".join(["a film"] * 80), "positive"), Row("a plot", "negative")] * 128
    step, all_rows = private_steps(model, rows, length=4)
    few = peak_bytes(lambda: step(Batch(all_rows.encoded, tuple(range(ROWS)))))
    large = peak_bytes(lambda: step(all_rows))
    assert large <= 1.05 * few
    loss = tuning_objective(model, Task("{text}, it was", LABEL_WORDS))
    prompts = torch.zeros(256, 4, model.hidden_size, requires_grad=True)
    together = peak_bytes(lambda: loss(prompts, all_rows).sum().backward())
    assert together > 2 * large, "the measurement detects memory that grows"


def test_no_row_moves_the_sum_by_more_than_c_and_the_attack_works_where_rows_share_a_pass() -> None:
    found = sensitivity.attack("rounding", 16, seeds=2)
    assert found.neighbours >= 8
    assert found.largest <= 1 + sensitivity.SLACK
    assert found.control > 1.5, "the control shows that the attack would be seen"


def test_audit_runs_runs() -> None:
    config = TuneOptions(num_virtual_tokens=4, steps=3, batch_size=8)
    result = audit_runs.measure(tiny_model(), TASK, reviews(40), config, epsilon=8.0, runs=3, canaries=10)
    assert {kind: len(bounds) for kind, bounds in result["bounds"].items()} == {"data": 3, "gradient": 3}
    assert set(result["not_refuted"]) == {"data", "gradient"}
