"""ε is correct: an independent accountant agrees, and settings without a guarantee are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from post_client.privacy import (
    DEFAULT_DELTA,
    PrivacyConfig,
    PrivacyPlan,
    accounting,
    default_delta,
    epsilon_for,
    noise_for,
)
from post_client.privacy.accounting import check_delta, running_epsilon
from post_shared.errors import PrivacyInvalid


def by_pld(noise: float, delta: float, rate: float, steps: int) -> float:
    """Google's privacy-loss-distribution accountant, for the same mechanism."""
    accountant = pld.PLDAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(
    ("noise", "delta", "rate", "steps"),
    [
        (0.5, 1e-5, 0.0105, 310),
        (0.6, 1e-5, 0.01, 300),
        (1.0, 1e-5, 0.01, 1000),
        (2.0, 1e-6, 0.05, 300),
        (5.0, 1e-4, 0.5, 100),
        (1.0, 1e-5, 1.0, 10),
        (20.0, 1e-5, 0.05, 300),
    ],
)
def test_epsilon_agrees_with_an_independent_accountant(noise: float, delta: float, rate: float, steps: int) -> None:
    spent = epsilon_for(noise, delta, rate, steps)
    assert spent.accountant == "PRV"
    expected = by_pld(noise, delta, rate, steps)
    assert expected * 0.999 <= spent.epsilon <= expected * 1.02


@pytest.mark.parametrize("epsilon", [0.2, 8.0])
def test_the_noise_for_an_epsilon_spends_at_most_that_epsilon(epsilon: float) -> None:
    noise = noise_for(epsilon, 1e-5, 0.02, 200)
    assert 0.99 * epsilon <= epsilon_for(noise, 1e-5, 0.02, 200).epsilon <= epsilon
    assert by_pld(noise, 1e-5, 0.02, 200) <= epsilon


@pytest.mark.parametrize("delta", [1e-10, 1e-12, 1e-14])
def test_epsilon_is_above_the_exact_value_even_for_tiny_delta(delta: float) -> None:
    """80 full-batch steps with σ = 10 are one Gaussian with σ = 10 / √80, whose δ(ε) is known (Balle & Wang 2018)."""
    shift, epsilon = math.sqrt(80) / 10, epsilon_for(10.0, delta, 1.0, 80).epsilon
    exact = norm.cdf(shift / 2 - epsilon / shift) - math.exp(epsilon) * norm.cdf(-shift / 2 - epsilon / shift)
    assert exact <= delta


def test_rdp_is_used_and_named_where_prv_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert epsilon_for(0.05, 1e-5, 0.01, 100).accountant == "RDP"
    prv = epsilon_for(0.9, 1e-5, 0.01, 100)

    def fail(*_: object) -> float:
        raise RuntimeError("no numerics today")

    monkeypatch.setattr(accounting, "_by_prv", fail)
    accounting._compose.cache_clear()
    rdp = epsilon_for(0.9, 1e-5, 0.01, 100)
    accounting._compose.cache_clear()
    assert rdp.accountant == "RDP"
    assert rdp.epsilon > prv.epsilon


def test_the_running_epsilon_grows_and_is_never_too_small() -> None:
    running = running_epsilon(1.0, 1e-5, 0.01)
    values = [running(step) for step in (0, 1, 10, 100, 1000)]
    assert values[0] == 0
    assert values == sorted(values)
    assert values[-1] >= epsilon_for(1.0, 1e-5, 0.01, 1000).epsilon
    plan = PrivacyPlan.make(PrivacyConfig(epsilon=3.0), 500, batch_size=10, steps=100)
    assert plan.epsilon_after(1) < plan.epsilon_after(50) <= plan.epsilon_after(100) == plan.spent.epsilon


@given(st.integers(1, 100_000))
def test_the_default_delta_is_far_below_one_in_n_and_tells_nothing_of_n(examples: int) -> None:
    delta = default_delta(examples)
    assert delta == default_delta(1) == DEFAULT_DELTA
    assert 0 < delta <= 1 / (10 * examples)
    assert check_delta(delta, examples) == delta


@pytest.mark.parametrize("examples", [100_001, 10**9])
def test_for_more_rows_the_owner_names_delta(examples: int) -> None:
    with pytest.raises(PrivacyInvalid, match="--delta"):
        default_delta(examples)
    with pytest.raises(PrivacyInvalid, match="--delta"):
        PrivacyPlan.make(PrivacyConfig(), examples, batch_size=16, steps=1)
    assert PrivacyPlan.make(PrivacyConfig(delta=1e-10), examples, batch_size=16, steps=1).delta == 1e-10


@pytest.mark.parametrize("delta", [0.0, -1e-5, 1.0, 0.01, 0.02, float("nan")])
def test_a_delta_of_one_in_n_or_more_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyInvalid):
        check_delta(delta, 100)
    with pytest.raises(PrivacyInvalid):
        PrivacyPlan.make(PrivacyConfig(delta=delta), 100, batch_size=10, steps=10)


@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": float("inf")},
        {"epsilon": float("nan")},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": float("inf")},
        {"max_grad_norm": float("nan")},
        {"batch_size": 0},
        {"steps": 0},
        {"delta": 1.0},
    ],
)
def test_a_config_without_a_guarantee_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(PrivacyInvalid):
        PrivacyConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [(0.0, 1e-5, 0.1, 10), (-1.0, 1e-5, 0.1, 10), (1.0, 0.0, 0.1, 10), (1.0, 1e-5, 0.0, 10), (1.0, 1e-5, 0.1, 0)],
)
def test_a_mechanism_without_noise_sampling_or_steps_is_refused(arguments: tuple[float, float, float, int]) -> None:
    with pytest.raises(PrivacyInvalid):
        epsilon_for(*arguments)


def test_no_rows_are_refused() -> None:
    with pytest.raises(PrivacyInvalid):
        PrivacyPlan.make(PrivacyConfig(), 0, batch_size=10, steps=10)


@settings(max_examples=4)
@given(st.integers(2, 5000), st.integers(1, 500), st.integers(1, 100), st.sampled_from([2.0, 8.0]))
def test_a_plan_never_overspends(examples: int, batch_size: int, steps: int, epsilon: float) -> None:
    plan = PrivacyPlan.make(PrivacyConfig(epsilon=epsilon), examples, batch_size=batch_size, steps=steps)
    assert plan.spent.epsilon <= epsilon
    assert plan.delta < 1 / examples
    assert 0 < plan.rate <= 1


def test_a_larger_data_set_or_budget_needs_less_noise() -> None:
    noise = PrivacyPlan.make(PrivacyConfig(epsilon=8), 1000, batch_size=20, steps=50).noise_multiplier
    assert PrivacyPlan.make(PrivacyConfig(epsilon=8), 4000, batch_size=20, steps=50).noise_multiplier < noise
    assert PrivacyPlan.make(PrivacyConfig(epsilon=2), 1000, batch_size=20, steps=50).noise_multiplier > noise
    assert PrivacyPlan.make(PrivacyConfig(epsilon=8), 1000, batch_size=20, steps=200).noise_multiplier > noise


def test_the_configs_own_batch_size_and_steps_take_precedence() -> None:
    plan = PrivacyPlan.make(PrivacyConfig(batch_size=50, steps=7), 1000, batch_size=20, steps=100)
    assert (plan.rate, plan.steps) == (0.05, 7)


def test_the_statement_as_text_and_as_json() -> None:
    plan = PrivacyPlan.make(PrivacyConfig(epsilon=8.0), 600, batch_size=20, steps=30)
    statement = plan.statement()
    document = json.loads(statement.json())
    assert document["private"] is True
    assert document["epsilon"] == 8.0
    assert document["epsilon_spent"] <= 8.0
    assert document["noise_multiplier"] == plan.noise_multiplier
    assert {"opacus", "torch", "post-transfer"} <= set(document["versions"])
    assert statement.claim == (8.0, DEFAULT_DELTA)
    for phrase in (
        "(8, 1e-06)",
        "one row",
        "added or removed",
        "Poisson",
        "PRV",
        "Not covered",
        "label words",
        "uploads",
    ):
        assert phrase in statement.words()


def test_a_seeded_run_claims_nothing() -> None:
    statement = PrivacyPlan.make(PrivacyConfig(seed=1), 600, batch_size=20, steps=30).statement()
    assert statement.claim is None
    assert json.loads(statement.json())["private"] is False
    assert statement.words().startswith("NOT PRIVATE")


def test_the_spent_epsilon_grows_during_a_run_with_little_noise_too() -> None:
    plan = PrivacyPlan.make(PrivacyConfig(epsilon=8), 8000, batch_size=64, steps=64)
    spent = [plan.epsilon_after(step) for step in range(1, 65)]
    assert spent == sorted(spent)
    assert spent[0] < 0.8 * spent[-1]
    assert len(set(spent)) >= 10
    for step in (1, 7, 30, 64):
        assert spent[step - 1] >= 0.995 * epsilon_for(plan.noise_multiplier, plan.delta, plan.rate, step).epsilon
    assert spent[-1] == plan.spent.epsilon


def test_every_member_of_the_statement_is_explained() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference-statement.md").read_text("utf-8")
    document = json.loads(PrivacyPlan.make(PrivacyConfig(), 600, batch_size=20, steps=3).statement().json())
    assert all(f"`{member}`" in page for member in document)
