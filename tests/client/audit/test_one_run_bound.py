"""The bound of the one-run audit: numbers checked by hand, limiting cases, and that it stays below the true ε."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from post_shared.errors import InvalidInput
from post_shared.method.audit.one_run_bound import epsilon_lower_bound, evidence, p_value, strongest


def test_numbers_by_hand() -> None:
    # 1 guess about 1 canary: P[right] = e^ε / (1 + e^ε), α = max_i (2 / i) P[1 > W >= 1 - i] = 2 P[W = 0].
    assert p_value(1, 1, 1, epsilon=0.0, delta=0.0) == pytest.approx(0.5)
    assert p_value(1, 1, 1, epsilon=math.log(3), delta=0.1) == pytest.approx(0.75 + 2 * 0.25 * 0.1)
    # 2 guesses, both right: β = 1/4; α = max(2 P[W = 1], P[W = 1 or 0]) = max(2 · 1/2, 3/4) = 1; m = 3.
    assert p_value(3, 2, 2, epsilon=0.0, delta=0.01) == pytest.approx(0.25 + 1.0 * 3 * 0.01)
    # All 100 right, pure: (e^ε / (1 + e^ε))^100 = 0.05.
    chance = 0.05 ** (1 / 100)
    assert epsilon_lower_bound(100, 100, 100, delta=0.0) == pytest.approx(math.log(chance / (1 - chance)), abs=1e-4)


@settings(max_examples=30)
@given(st.integers(1, 300), st.data())
def test_limits(canaries: int, data: st.DataObject) -> None:
    guesses = data.draw(st.integers(0, canaries))
    right = data.draw(st.integers(0, guesses))
    delta = data.draw(st.sampled_from([0.0, 1e-6, 1e-3]))
    bound = epsilon_lower_bound(canaries, guesses, right, delta)
    assert bound >= 0
    assert epsilon_lower_bound(canaries, guesses, right, delta, confidence=0.99) <= bound
    assert epsilon_lower_bound(canaries, guesses, right, 0.0) >= bound, "δ allows more right guesses"
    if right:
        assert epsilon_lower_bound(canaries, guesses, right - 1, delta) <= bound
    if right <= guesses / 2:
        assert bound == 0, "no better than coins"


@pytest.mark.parametrize(("canaries", "guesses", "right", "delta"), [(5, 6, 1, 0.0), (5, 5, 6, 0.0), (5, 5, 1, 1.0)])
def test_impossible_counts_are_refused(canaries: int, guesses: int, right: int, delta: float) -> None:
    with pytest.raises(InvalidInput):
        p_value(canaries, guesses, right, 1.0, delta)


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 4.0])
def test_randomised_response_is_never_refuted_more_often_than_promised(epsilon: float) -> None:
    """Every canary answers truthfully with probability e^ε / (1 + e^ε): exactly ε-private, and the worst case."""
    generator = np.random.default_rng(0)
    chance, trials, canaries = 1 / (1 + math.exp(-epsilon)), 300, 300
    bounds = []
    for _ in range(trials):
        included = generator.random(canaries) < 0.5
        answers = np.where(generator.random(canaries) < chance, included, ~included)
        bounds.append(evidence(answers + 0.001 * generator.random(canaries), included, delta=0.0).epsilon)
    wrong = sum(bound > epsilon for bound in bounds)
    assert wrong <= 0.05 * trials
    if epsilon >= 1:
        assert np.median(bounds) > 0.4 * epsilon, "the bound isn't vacuous"


def test_scores_of_a_gaussian_mechanism_are_not_refuted_but_of_one_with_a_quarter_of_the_noise_are() -> None:
    generator = np.random.default_rng(1)
    included = generator.random(100_000) < 0.5
    sigma = 4.22  # (1, 1e-6)-private for one release of sensitivity 1
    noise = generator.normal(size=included.shape)
    assert evidence(included / sigma + noise, included, delta=1e-6).epsilon < 1.0
    assert evidence(4 * included / sigma + noise, included, delta=1e-6).epsilon > 1.0


def test_few_canaries_can_not_refute_any_run() -> None:
    assert strongest(8, delta=1e-5) < 1.0
    assert strongest(30, delta=1e-5) > 1.0
    bounds = [strongest(canaries, delta=1e-5) for canaries in (10, 100, 1000)]
    assert bounds == sorted(bounds)


def test_uninformative_scores_prove_nothing() -> None:
    included = np.random.default_rng(2).random(500) < 0.5
    assert evidence(np.zeros(500), included, delta=1e-5).epsilon < 0.5
    with pytest.raises(InvalidInput):
        evidence(np.zeros(3), included, delta=1e-5)
