"""Batch sizes are binomial, noise is normal, and only secure randomness is private."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from post_client.privacy import (
    KeyedRandomness,
    PoissonSampler,
    Randomness,
    SecureRandomness,
    SeededRandomness,
    gaussian,
    new_key,
)
from post_client.privacy.randomness import trial_key
from post_shared.errors import PrivacyInvalid

SOURCES: list[Randomness] = [SecureRandomness(), SeededRandomness(7), KeyedRandomness(new_key())]


def inclusions(randomness: Randomness, examples: int, rate: float, steps: int) -> np.ndarray:
    sampler = PoissonSampler(examples, rate, randomness)
    table = np.zeros((steps, examples))
    for step in range(steps):
        table[step, sampler.draw(step)] = 1
    return table


def test_sizes_have_the_binomials_mean_and_variance() -> None:
    examples, rate, steps = 200, 0.1, 4000
    sizes = inclusions(SeededRandomness(1), examples, rate, steps).sum(axis=1)
    expected = stats.binom(examples, rate)
    assert abs(sizes.mean() - expected.mean()) < 4 * expected.std() / np.sqrt(steps)
    assert abs(sizes.var() / expected.var() - 1) < 4 * np.sqrt(2 / steps)
    assert len(set(sizes)) > 10, "a fixed size would be another mechanism"


def test_rows_are_included_independently_of_each_other_and_of_other_steps() -> None:
    examples, rate, steps = 60, 0.3, 4000
    table = inclusions(SeededRandomness(2), examples, rate, steps)
    counts = table.sum(axis=0)  # every row equally often
    assert stats.chisquare(counts, np.full(examples, counts.mean())).pvalue > 1e-3
    correlation = np.corrcoef(table, rowvar=False)[np.triu_indices(examples, 1)] * np.sqrt(steps)
    assert stats.kstest(correlation, "norm").pvalue > 1e-3
    lagged = (table[1:] - rate) * (table[:-1] - rate) / (rate * (1 - rate))
    assert abs(lagged.mean()) < 4 / np.sqrt(lagged.size)


@pytest.mark.parametrize("randomness", SOURCES, ids=lambda source: type(source).__name__)
def test_all_sources_have_the_same_distribution(randomness: Randomness) -> None:
    drawn = randomness.integers(200_000, "test", 0) / 2**53
    assert stats.kstest(drawn, "uniform").pvalue > 1e-6
    size = inclusions(randomness, 10_000, 0.05, 20).sum()
    assert abs(size - 10_000) < 6 * np.sqrt(200_000 * 0.05 * 0.95)


def test_batches_may_be_empty_or_complete() -> None:
    assert PoissonSampler(3, 1e-12, SecureRandomness()).draw(0).tolist() == []
    assert PoissonSampler(3, 1.0, SecureRandomness()).draw(0).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("examples", "rate"), [(0, 0.5), (5, 0.0), (5, -0.1), (5, 1.1), (5, float("nan"))])
def test_invalid_sampling_is_refused(examples: int, rate: float) -> None:
    with pytest.raises(PrivacyInvalid):
        PoissonSampler(examples, rate, SecureRandomness())


def test_no_two_purposes_steps_trials_or_keys_share_numbers() -> None:
    """Every charged run draws from here: noise that two steps or trials share could be removed."""
    key, other = new_key(), new_key()
    keys = [key, other, *(trial_key(key, trial) for trial in (0, 1, 10))]
    drawn = [
        KeyedRandomness(each).integers(8, purpose, step).tobytes()
        for each in keys
        for purpose in ("noise", "sampling")
        for step in (0, 1, 10)
    ]
    assert len(set(drawn)) == len(drawn) == 30
    assert KeyedRandomness(key).integers(8, "noise", 0).tobytes() == drawn[0]


def test_seeded_randomness_repeats_and_secure_randomness_does_not() -> None:
    seeded = SeededRandomness(3)
    again = SeededRandomness(3).integers(8, "noise", 5)
    np.testing.assert_array_equal(seeded.integers(8, "noise", 5), again)
    for other in (seeded.integers(8, "noise", 6), seeded.integers(8, "sampling", 5)):
        assert not np.array_equal(other, again)
    secure = SecureRandomness()
    assert not np.array_equal(secure.integers(8, "noise", 5), secure.integers(8, "noise", 5))
    assert secure.private
    assert not seeded.private


@given(st.integers(1, 7), st.integers(1, 9), st.floats(1e-6, 1e6))
def test_noise_has_the_shape_and_scales_with_the_deviation(rows: int, columns: int, deviation: float) -> None:
    one = gaussian(SeededRandomness(0), (rows, columns), 1.0, 0)
    assert one.shape == (rows, columns)
    assert one.dtype == np.float64
    np.testing.assert_allclose(gaussian(SeededRandomness(0), (rows, columns), deviation, 0), deviation * one)


@pytest.mark.parametrize("randomness", SOURCES, ids=lambda source: type(source).__name__)
def test_noise_is_normal(randomness: Randomness) -> None:
    noise = gaussian(randomness, (400, 500), 3.0, 0).ravel()
    assert stats.kstest(noise / 3.0, "norm").pvalue > 1e-6
    assert abs(noise.std() / 3.0 - 1) < 6 / np.sqrt(2 * noise.size)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 6 / np.sqrt(noise.size)


def test_deviation_zero_gives_exactly_no_noise() -> None:
    assert not gaussian(SecureRandomness(), (2, 2), 0.0, 0).any()
