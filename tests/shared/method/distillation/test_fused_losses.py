"""The fused vocabulary losses equal the two losses of Eq. 1."""

from __future__ import annotations

import pytest
import torch

from post_shared.data.batches import IGNORE_INDEX
from post_shared.method.distillation import fused_losses
from post_shared.method.distillation.fused_losses import vocabulary_losses
from post_shared.method.distillation.objective import Objective
from post_shared.method.losses import language_model_loss, softened_cross_entropy
from tests.models import tiny_model


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_values_and_gradients_equal_those_of_the_separate_losses(
    temperature: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fused_losses.CHUNK, "cpu", 4 * 50 * 3)  # chunks of three positions, the last one of one
    torch.manual_seed(0)
    teacher, student = (scale * torch.randn(10, 50) for _ in range(2))
    student.requires_grad_()
    tokens = torch.tensor([3, IGNORE_INDEX, 0, 49, 7, IGNORE_INDEX, 7, 1, 2, IGNORE_INDEX])
    weights = torch.rand(2, 10)
    fused = vocabulary_losses(teacher, student, tokens, temperature)
    exact = student.detach().double().requires_grad_()
    expected = softened_cross_entropy(teacher, exact, temperature), language_model_loss(exact, tokens)
    for loss, reference in zip(fused, expected, strict=True):
        torch.testing.assert_close(loss, reference.float(), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad((weights * torch.stack(fused)).sum(), student)
    (reference,) = torch.autograd.grad((weights * torch.stack([each.float() for each in expected])).sum(), exact)
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-5)


def test_huge_logits_give_finite_losses() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    for loss in vocabulary_losses(torch.tensor([[-1e4, 1e4, 0.0]]), student, torch.tensor([1]), 2.0):
        assert torch.isfinite(loss).all()
    losses = vocabulary_losses(-student.detach(), student, torch.tensor([1]), 2.0)
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), student)
    torch.testing.assert_close(gradient, torch.tensor([[2.0 + 1.0, -2.0 - 1.0, 0.0]]))


@pytest.mark.parametrize("frozen", [True, False])
def test_the_target_s_head_replaces_a_frozen_one_with_the_same_logits(*, frozen: bool) -> None:
    """Autocast would round a frozen head in every step; the target's is rounded already."""
    target, student = tiny_model(), tiny_model()
    target.model.to(torch.bfloat16)
    for weight in student.model.parameters():
        weight.requires_grad_(not frozen)
    objective = Objective(target, student, 2.0)
    assert objective._head == student.head, "without autocast nothing is rounded"
    hidden = torch.randn(3, student.hidden_size)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (objective._head == target.head) is frozen
        assert torch.equal(objective._head(hidden), student.head(hidden))


def test_a_head_that_differs_from_the_target_s_is_the_student_s() -> None:
    target, student = tiny_model(), tiny_model(seed=1)
    assert Objective(target, student, 2.0)._head == student.head
