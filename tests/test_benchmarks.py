"""The benchmarks run, and the figure that is claimed holds."""

from __future__ import annotations

import math

import pytest
from benchmarks.dp_cost import measure, student_shaped_model

from tests.models import tiny_model


def test_dp_cost_runs() -> None:
    result = measure(tiny_model(), batch_size=4, steps=2, length=5)
    assert set(result) == {"plain_seconds", "private_seconds", "ratio"}
    assert all(math.isfinite(value) and value > 0 for value in result.values())


@pytest.mark.slow
def test_a_private_step_costs_little_more() -> None:
    """At most 1.15 times a plain step at the same batch size."""
    result = measure(student_shaped_model(layers=8), batch_size=16, steps=12, length=20)
    assert result["ratio"] <= 1.15
