"""The benchmarks run; what they measure is for people to read."""

from __future__ import annotations

import math

from benchmarks.dp_cost import measure, measure_runs
from benchmarks.dp_memory import peak_bytes, private_step

from post_shared.data import Row
from tests.models import tiny_model


def test_dp_cost_runs() -> None:
    result = measure(tiny_model(), batch_size=4, steps=2, length=5)
    assert set(result) == {"plain_seconds", "private_seconds", "ratio"}
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    assert measure_runs(tiny_model(), batch_size=4, steps=2, length=5, rounds=1) > 0


def test_a_large_logical_batch_takes_the_memory_of_its_micro_batch() -> None:
    """A law, not a time: 4,096 rows in micro-batches of 256 hold no more tensors at once than 256 rows do."""
    model = tiny_model(layers=1)
    rows = [Row("a film", "positive"), Row("a plot", "negative")] * 2048
    small = peak_bytes(private_step(model, rows[:256], micro=256, length=4))
    large = peak_bytes(private_step(model, rows, micro=256, length=4))
    whole = peak_bytes(private_step(model, rows[:1024], micro=1024, length=4))
    assert large <= 1.1 * small
    assert whole > 2 * small, "the measure sees memory that grows"
