"""Laws of the paper's losses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from post_shared.method import losses

torch.manual_seed(0)
A, B, C, D = (torch.randn(5, 11) * 3 for _ in range(4))


def imitation(target: Tensor, student: Tensor, temperature: float = 2.0) -> Tensor:
    """Eq. 4 from logits on both sides."""
    return losses.imitation_loss(target, losses.soften(student, temperature), temperature)


def shift(
    target: Tensor, target_plain: Tensor, student: Tensor, student_plain: Tensor, temperature: float = 2.0
) -> Tensor:
    """Eq. 5 from logits on both sides."""
    change = losses.soften(student - student_plain, temperature)
    return losses.shift_loss(target, target_plain, change, temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_zero_on_equal_inputs_and_positive_otherwise(temperature: float) -> None:
    for loss in (losses.softened_cross_entropy, imitation):
        torch.testing.assert_close(loss(A, A, temperature), torch.zeros(5), atol=1e-5, rtol=0)
        assert (loss(A, B, temperature) > 0).all()
    torch.testing.assert_close(shift(A, B, A, B, temperature), torch.zeros(5), atol=1e-5, rtol=0)
    assert (shift(A, B, C, D, temperature) > 0).all()
    torch.testing.assert_close(losses.cosine_loss(A, A * 7), torch.zeros(5), atol=1e-6, rtol=0)


def test_imitation_at_temperature_one_is_the_plain_divergence() -> None:
    target, student = A.softmax(-1), B.softmax(-1)
    plain = (student * (student / target).log()).sum(-1)  # KL(student || target): the student is the reference
    torch.testing.assert_close(imitation(A, B, 1.0), plain)


def test_adding_a_constant_to_all_logits_changes_nothing() -> None:
    torch.testing.assert_close(imitation(A + 5, B - 3), imitation(A, B), atol=1e-5, rtol=1e-5)
    shifted = shift(A + 5, B - 1, C + 2, D)
    torch.testing.assert_close(shifted, shift(A, B, C, D), atol=1e-5, rtol=1e-5)


def test_shift_loss_does_not_depend_on_the_plain_logits() -> None:
    """Eq. 5 compares changes: equal changes of different plain logits have loss 0."""
    change = torch.randn(5, 11)
    torch.testing.assert_close(shift(A + change, A, B + change, B), torch.zeros(5), atol=1e-5, rtol=0)


def test_softened_cross_entropy_carries_tau_squared() -> None:
    plain = losses.divergence(losses.soften(A, 2.0), losses.soften(B, 2.0))
    torch.testing.assert_close(losses.softened_cross_entropy(A, B, 2.0), 4 * plain)


def test_alpha_zero_and_one_give_the_two_parts() -> None:
    first, second = torch.rand(5), torch.rand(5)
    torch.testing.assert_close(losses.transfer_loss(first, second, 0.0), first)
    torch.testing.assert_close(losses.transfer_loss(first, second, 1.0), second)


def test_distillation_loss_is_the_weighted_sum_of_table_8() -> None:
    one = torch.tensor(1.0)
    assert losses.distillation_loss(one, one * 10, one * 100) == 5 + 20 + 100


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 0.99))
def test_alpha_heuristic_stays_in_range_and_follows_eq_6(zero_shot: float, prompted: float, guess: float) -> None:
    alpha = losses.alpha_heuristic(zero_shot, prompted, guess)
    assert 0.0 <= alpha <= 1.0
    if prompted > guess and 0 <= (zero_shot - guess) / (prompted - guess) <= 1:
        assert alpha == (zero_shot - guess) / (prompted - guess)
    if prompted <= guess:
        assert alpha == 1.0


def test_answer_loss_is_the_mean_over_each_rows_own_tokens() -> None:
    logits, tokens, rows = torch.randn(6, 9), torch.arange(6), torch.tensor([0, 0, 0, 1, 2, 2])
    per_token = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    expected = torch.stack([per_token[:3].mean(), per_token[3], per_token[4:].mean()])
    torch.testing.assert_close(losses.answer_loss(logits, tokens, rows, 3), expected)
