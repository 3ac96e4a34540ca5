"""The benchmarks run; what they measure is for people to read."""

from __future__ import annotations

import math

import pytest
from benchmarks import audit_runs, shadow_prompts
from benchmarks.dp_cost import LABEL_WORDS, measure, measure_runs, reviews

from post_client.tuning import TuneConfig, encode_private, starting_prompt
from post_shared.tasks import Task
from tests.models import tiny_model

TASK = Task("{text}, it was", LABEL_WORDS)


def test_dp_cost_runs() -> None:
    result = measure(tiny_model(), batch_size=4, steps=2, length=5)
    assert set(result) == {"plain_seconds", "private_seconds", "ratio"}
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    assert measure_runs(tiny_model(), batch_size=4, steps=2, length=5, rounds=1) > 0


@pytest.mark.parametrize("private", [False, True])
def test_shadow_prompts_runs(private: bool) -> None:
    model, config = tiny_model(), TuneConfig(length=5)
    encoded, start = encode_private(model, TASK, reviews(40), config), starting_prompt(model, TASK, config)
    result = shadow_prompts.measure(
        model, encoded, start.embeddings, TASK, count=3, batch_size=4, steps=2, private=private
    )
    assert set(result) == {"one_by_one", "at_once"} | (set() if private else {"one_by_one_prompt_once"})
    assert all(value > 0 for each in result.values() for value in each.values())
    assert result["one_by_one"]["times_faster"] == result["one_by_one"]["times_less_arithmetic"] == 1.0


def test_audit_runs_runs() -> None:
    config = TuneConfig(length=4, steps=3, batch_size=8)
    result = audit_runs.measure(tiny_model(), TASK, reviews(40), config, epsilon=8.0, runs=3, canaries=10)
    assert {kind: len(some) for kind, some in result["bounds"].items()} == {"data": 3, "gradient": 3}
    assert set(result["not_refuted"]) == {"data", "gradient"}
