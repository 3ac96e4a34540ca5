"""The benchmarks run; what they measure is for people to read."""

from __future__ import annotations

import math

from benchmarks.dp_cost import measure, measure_runs

from tests.models import tiny_model


def test_dp_cost_runs() -> None:
    result = measure(tiny_model(), batch_size=4, steps=2, length=5)
    assert set(result) == {"plain_seconds", "private_seconds", "ratio"}
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    assert measure_runs(tiny_model(), batch_size=4, steps=2, length=5, rounds=1) > 0
