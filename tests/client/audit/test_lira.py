"""LiRA and its ROC curves: limiting cases, and no leak found where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm

from post_shared.errors import InvalidInput
from post_shared.method.audit.lira import attack, likelihood_ratios, random_halves
from post_shared.method.audit.roc import Ranking


def leaking(shift: float, *, prompts: int = 16, rows: int = 200, seed: int = 0):  # type: ignore[no-untyped-def]
    """Confidences around a level for each row, plus ``shift`` standard deviations where the prompt saw the row."""
    generator = np.random.default_rng(seed)
    members = random_halves(prompts, rows, seed + 1)
    return 3 * generator.normal(size=rows) + generator.normal(size=members.shape) + shift * members, members


# --- curves -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auc_is_the_share_of_pairs_in_the_right_order(pairs: list[tuple[int, bool]]) -> None:
    scores, members = np.array([float(s) for s, _ in pairs]), np.array([m for _, m in pairs])
    if members.all() or not members.any():
        return
    curve = Ranking(scores, members).curve()
    share = mannwhitneyu(scores[members], scores[~members]).statistic / (members.sum() * (~members).sum())
    assert curve.auc == pytest.approx(share)
    assert curve.at(1.0) == 1.0
    for points in (curve.false_positives, curve.true_positives):
        assert points[0] == 0
        assert points[-1] == pytest.approx(1.0)
        assert (np.diff(points) >= 0).all()


def test_true_positives_at_few_false_alarms() -> None:
    members = np.array([True] * 4 + [False] * 100)
    scores = np.concatenate([[9.0, 8.0, 5.0, -1.0], [6.0, 4.0], np.zeros(98)])
    curve = Ranking(scores, members).curve()
    assert curve.at(0.001) == 0.5, "two members rank above every other row"
    assert curve.at(0.01) == 0.75, "one false alarm in 100 is allowed"


def test_a_weight_of_two_is_the_row_twice() -> None:
    generator = np.random.default_rng(0)
    scores, members = generator.integers(0, 9, 30).astype(float), generator.random(30) < 0.5
    weights = generator.integers(0, 3, 30)
    twice = Ranking(scores.repeat(weights), members.repeat(weights)).curve()
    weighted = Ranking(scores, members).curve(weights.astype(float))
    assert weighted.auc == pytest.approx(twice.auc)
    assert weighted.at(0.1) == pytest.approx(twice.at(0.1))


# --- LiRA ---------------------------------------------------------------------------------------------


def test_likelihood_ratios_equal_a_leave_one_out_loop() -> None:
    confidences, members = leaking(1.0, prompts=6, rows=12)
    ratios = likelihood_ratios(confidences, members)
    for k in range(6):
        others = [o for o in range(6) if o != k]
        sides = {}
        for side in (True, False):
            groups = [[confidences[o, i] for o in others if members[o, i] == side] for i in range(12)]
            spread = sum(float(((g - np.mean(g)) ** 2).sum()) for g in groups if g)
            freedom = sum(max(0, len(g) - 1) for g in groups)
            sides[side] = ([np.mean(g) if g else np.nan for g in groups], np.sqrt(spread / freedom))
        for i in range(12):
            like = {side: norm.logpdf(confidences[k, i], mean[i], spread) for side, (mean, spread) in sides.items()}
            np.testing.assert_allclose(ratios["online"][k, i], like[True] - like[False], atol=1e-8)
            if np.isfinite(ratios["offline"][k, i]):
                z = (confidences[k, i] - sides[False][0][i]) / sides[False][1]
                np.testing.assert_allclose(ratios["offline"][k, i], z, atol=1e-8)


@pytest.mark.parametrize("variant", ["online", "offline"])
def test_a_leak_is_found_and_its_size_too(variant: str) -> None:
    confidences, members = leaking(1.0)
    result = attack(confidences, members, variant)  # type: ignore[arg-type]
    assert result.p_value < 0.01
    assert result.chance[1] < result.auc.low <= result.auc.value <= result.auc.high
    assert 0.65 < result.auc.value < norm.cdf(1 / np.sqrt(2)) + 0.02, "never better than knowing the two Gaussians"
    few, many = (result.true_positives[rate] for rate in (0.001, 0.01))
    assert few.value <= many.value
    assert many.low <= many.value <= many.high
    assert result.members + result.others == members.size


@pytest.mark.parametrize("variant", ["online", "offline"])
def test_without_a_leak_the_auc_is_one_half(variant: str) -> None:
    """Averaged over many draws: if the target helped to fit its own Gaussians, it would show as a bias here."""
    aucs = []
    for seed in range(60):
        confidences, members = leaking(0.0, prompts=8, rows=100, seed=seed)
        ratios = likelihood_ratios(confidences, members)[variant]  # type: ignore[index]
        keep = np.isfinite(ratios)
        aucs.append(Ranking(ratios[keep], members[keep]).curve().auc)
    assert abs(np.mean(aucs) - 0.5) < 4 * np.std(aucs) / np.sqrt(len(aucs))
    assert np.std(aucs) < 0.05


def test_the_chance_interval_covers_runs_without_a_leak() -> None:
    inside = 0
    for seed in range(10):
        confidences, members = leaking(0.0, prompts=8, rows=60, seed=seed)
        result = attack(confidences, members, "online")
        inside += result.chance[0] <= result.auc.value <= result.chance[1]
    assert inside >= 7


def test_equal_confidences_reveal_nothing() -> None:
    members = random_halves(8, 20, seed=0)
    assert attack(np.ones((8, 20)), members, "online").auc.value == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(3, 100), (8, 7)])
def test_too_few_prompts_or_rows_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match="LiRA needs"):
        attack(np.zeros(shape), random_halves(*shape, seed=0), "online")
