"""PromptDPSGD keeps the laws that its guarantee rests on; the PEFT + Opacus-hooks pairing breaks one of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from post_client.privacy import (
    PrivacyConfig,
    PrivacyPlan,
    PromptDPSGD,
    Randomness,
    SecureRandomness,
    SeededRandomness,
    dp_optimizer,
)
from post_client.tuning.tune import tuning_objective
from post_shared.data.batches import Batch, EncodedRows
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.training.optimizer import Loss, PromptAdam
from tests.models import CAUSAL, LABELS, MASKED, TEXTS, tiny_model

TASK = Task("{text}, it was", {"positive": ("good", "great"), "negative": ("bad", "terrible")})
LENGTH, WIDTH, CLIP = 3, 32, 0.05


@cache
def setting(family: str = "llama") -> tuple[LanguageModel, EncodedRows, Loss]:
    model = tiny_model(family, layers=2)
    # The second half has the texts of the first with the other label.
    other = [next(label for label in TASK.labels if label != own) for own in LABELS]
    encoded = encode_rows(model, TASK, TEXTS * 4, labels=(LABELS + other) * 2)
    return model, encoded, tuning_objective(model, TASK)


def watched(run: Callable[..., Any], shapes: list[tuple[int, int]]) -> Callable[..., Any]:
    """``run``, with the rows and positions of each call kept in ``shapes``."""

    def seen(**inputs: Any) -> Any:
        shapes.append(tuple(inputs["inputs_embeds"].shape[:2]))
        return run(**inputs)

    return seen


def start(seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed)))


def private(
    *,
    noise: float = 0.0,
    clip: float = CLIP,
    expected: float = 8.0,
    randomness: Randomness | None = None,
    learning_rate: float = 0.01,
) -> PromptDPSGD:
    return PromptDPSGD(
        start(),
        learning_rate,
        noise_multiplier=noise,
        max_grad_norm=clip,
        expected_batch_size=expected,
        randomness=randomness or SeededRandomness(0),
    )


def clipped_sum(rows: list[int], *, clip: float = CLIP) -> Tensor:
    """The sum of clipped gradients that a step on these rows makes, before noise."""
    _, encoded, loss = setting()
    optimizer = private(clip=clip)
    optimizer.update(loss, encoded.batch(rows))
    return optimizer.summed_gradient


# --- per-row gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED])
def test_per_row_gradients_equal_a_loop_over_single_rows(family: str) -> None:
    _, encoded, loss = setting(family)
    rows = [5, 0, 9, 1, 2, 8, 3, 6]
    found = list(private().row_gradients(loss, encoded.batch(rows)))
    assert [each.row for each in found] == rows
    for each in found:
        prompt = start()
        alone = loss(prompt, encoded.batch([each.row])).sum()
        (gradient,) = torch.autograd.grad(alone, prompt)
        torch.testing.assert_close(each.gradient, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
        torch.testing.assert_close(each.loss, alone.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED])
def test_a_rows_gradient_is_the_same_bits_whichever_rows_share_the_step(family: str) -> None:
    _, encoded, loss = setting(family)
    alone = {row: next(private().row_gradients(loss, encoded.batch([row]))).gradient for row in range(16)}
    generator = np.random.default_rng(0)
    for _ in range(8):
        rows = generator.choice(16, generator.integers(2, 9), replace=False).tolist()
        for each in private().row_gradients(loss, encoded.batch(rows)):
            assert torch.equal(each.gradient, alone[each.row])


def test_a_row_runs_alone_in_its_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape of a pass says nothing of other rows."""
    model, encoded, loss = setting()
    shapes: list[tuple[int, int]] = []
    monkeypatch.setattr(model, "run_body", watched(model.run_body, shapes))
    private().update(loss, encoded.batch(range(32)))
    assert shapes == [(1, LENGTH + encoded.length(row)) for row in range(32)]
    shapes.clear()
    private().update(loss, encoded.batch([]))
    assert not shapes


def test_a_loss_that_mixes_rows_is_refused() -> None:
    _, encoded, loss = setting()
    with pytest.raises(InvalidInput, match="one loss per row"):
        private().update(lambda prompt, batch: loss(prompt, batch).mean(), encoded.batch([0, 1]))


# --- limits -------------------------------------------------------------------------------------------


def test_no_noise_and_a_huge_clip_is_plain_tuning() -> None:
    _, encoded, loss = setting()
    generator = np.random.default_rng(0)
    dp, plain = private(noise=0.0, clip=1e9, expected=8.0), PromptAdam(start(), 0.01)
    for _ in range(6):
        batch = encoded.batch(generator.choice(len(encoded), 8, replace=False))
        assert dp.update(loss, batch) == pytest.approx(plain.update(loss, batch), rel=1e-4)
    assert float((plain.prompt - start()).detach().abs().max()) > 0.02, "it moved"
    torch.testing.assert_close(dp.prompt.detach(), plain.prompt.detach(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("waiting", [8, 5, 1])
def test_clipping_in_parts_equals_clipping_at_once(waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(range(32))
    whole = clipped_sum(rows)
    assert float(whole.norm()) > CLIP
    monkeypatch.setattr(dp_optimizer, "ROWS", waiting)
    torch.testing.assert_close(clipped_sum(rows), whole, rtol=1e-12, atol=1e-12)


def test_noise_comes_once_per_step_however_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    _, encoded, loss = setting()
    moved = []
    for waiting in (32, 4):
        monkeypatch.setattr(dp_optimizer, "ROWS", waiting)
        optimizer = private(noise=2.0, randomness=SeededRandomness(5))
        optimizer.update(loss, encoded.batch(range(32)))
        moved.append(optimizer.prompt.detach().clone())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=1e-6)


def test_sums_are_divided_by_the_expected_batch_size_not_the_real_one() -> None:
    _, encoded, loss = setting()
    for rows in ([0], [0, 1, 2, 3, 4]):
        optimizer = private(expected=16.0)
        optimizer.update(loss, encoded.batch(rows))
        torch.testing.assert_close(optimizer.master.grad, optimizer.summed_gradient / 16.0)


# --- sensitivity --------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.sets(st.integers(0, 31), max_size=8), st.integers(0, 31))
def test_one_more_row_moves_the_clipped_sum_by_at_most_c(rows: set[int], extra: int) -> None:
    without = clipped_sum(sorted(rows - {extra}))
    moved = clipped_sum(sorted(rows | {extra})) - without
    assert float(moved.norm()) <= CLIP * (1 + 1e-6)


@given(
    st.lists(st.lists(st.floats(width=32), min_size=6, max_size=6), min_size=1, max_size=6),
    st.floats(1e-4, 1e4),
)
def test_no_gradient_whatever_counts_for_more_than_c(rows: list[list[float]], clip: float) -> None:
    """Also NaN, infinite, enormous and denormal ones; each row is a neighbour's difference, exactly."""
    optimizer = PromptDPSGD(
        nn.Parameter(torch.zeros(2, 3)),
        0.1,
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=1,
        randomness=SeededRandomness(0),
    )
    before = torch.zeros(2, 3, dtype=torch.float64)
    optimizer.begin()
    for row in rows:
        optimizer.clip_and_accumulate(torch.tensor(row).reshape(1, 2, 3))
        moved = optimizer.summed_gradient - before
        assert float(moved.norm()) <= clip * (1 + 1e-9)
        before = optimizer.summed_gradient.clone()


def largest_movement(sum_of: Callable[[list[int]], Tensor]) -> float:
    """How far one added row moves the sum, over some neighbouring data sets."""
    pairs = [([at], [at, other]) for at in range(16) for other in (at ^ 8, at ^ 9)]  # the same text, another one
    return max(float((sum_of(more) - sum_of(fewer)).norm()) for fewer, more in pairs)


def test_the_check_passes_here_and_fires_on_peft_with_opacus_hooks() -> None:
    """PEFT embeds one prompt and repeats the output: the hooks see one gradient row for the whole batch."""
    clip = 1e-4  # every gradient is longer, so directions alone count
    assert largest_movement(lambda rows: clipped_sum(rows, clip=clip)) <= clip * (1 + 1e-6)

    torch.manual_seed(0)
    model, encoded, _ = setting()
    words = [model.tokenizer(" " + word, add_special_tokens=False).input_ids[0] for word in ("good", "bad")]
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    hooked = GradSampleModule(get_peft_model(tiny_model("llama", layers=2).model, config), loss_reduction="sum")
    trained = [weight for weight in hooked.parameters() if weight.requires_grad]
    optimizer = DPOptimizer(
        torch.optim.SGD(trained, lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=1,
        loss_reduction="sum",
    )

    def hooked_sum(rows: list[int]) -> Tensor:
        batch = encoded.batch(rows)
        optimizer.zero_grad()
        logits = hooked(input_ids=batch.token_ids, attention_mask=batch.attention_mask).logits
        answers = logits[batch.rows, batch.positions + LENGTH][:, words]  # (B, l + T, V) -> (B, 2)
        nn.functional.cross_entropy(answers, batch.labels, reduction="sum").backward()
        optimizer.step()
        return trained[0].summed_grad.clone()  # type: ignore[attr-defined,no-any-return]

    hooked.train()
    assert largest_movement(hooked_sum) == pytest.approx(2.0 * clip, rel=0.02)


# --- noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("randomness", [SeededRandomness(4), SecureRandomness()], ids=["seeded", "secure"])
def test_an_empty_batch_is_a_step_of_noise(randomness: Randomness) -> None:
    _, encoded, _ = setting()

    def never(prompt: Tensor, batch: Batch) -> Tensor:
        raise AssertionError("an empty batch has nothing to run")

    optimizer = private(noise=1.0, randomness=randomness)
    assert optimizer.update(never, encoded.batch([])) is None
    moved = (optimizer.prompt - start()).detach().abs()
    assert float(moved.min()) > 0
    assert not optimizer.summed_gradient.any()
    assert int(optimizer.state()["steps_done"]) == 1


def test_the_noise_has_standard_deviation_sigma_times_c() -> None:
    _, encoded, loss = setting()
    sigma, expected, samples = 0.7, 8.0, []
    optimizer = private(noise=sigma, expected=expected)
    for step in range(300):
        optimizer.update(loss, encoded.batch([0, 1] if step < 3 else []))
        samples.append(optimizer.master.grad * expected - optimizer.summed_gradient)
    noise = torch.stack(samples)
    assert abs(float(noise.std()) / (sigma * CLIP) - 1) < 5 / np.sqrt(2 * noise.numel())
    assert abs(float(noise.mean())) < 5 * sigma * CLIP / np.sqrt(noise.numel())
    assert len(torch.unique(noise)) == noise.numel(), "no noise is used twice"


# --- state and plan -----------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_where_it_was() -> None:
    _, encoded, loss = setting()
    batches = [encoded.batch(rows) for rows in ([0, 1, 2], [], [5], [3, 9, 17, 30], [])]
    undisturbed = private(noise=1.0)
    for batch in batches:
        undisturbed.update(loss, batch)
    first, second = private(noise=1.0), private(noise=1.0)
    for batch in batches[:2]:
        first.update(loss, batch)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    for batch in batches[2:]:
        second.update(loss, batch)
    torch.testing.assert_close(second.prompt, undisturbed.prompt, rtol=0, atol=0)


def test_the_prompt_is_the_only_thing_that_gets_a_gradient_or_moves() -> None:
    model, encoded, loss = setting()
    before = [weight.clone() for weight in model.model.parameters()]
    optimizer = private(noise=1.0)
    optimizer.update(loss, encoded.batch([0, 1, 2]))
    for weight, old in zip(model.model.parameters(), before, strict=True):
        assert weight.grad is None
        assert torch.equal(weight, old)
    assert optimizer.prompt.grad is None


def test_the_learning_rate_can_be_set() -> None:
    _, encoded, loss = setting()
    optimizer = private()
    optimizer.set_learning_rate(0.0)
    optimizer.update(loss, encoded.batch([0]))
    torch.testing.assert_close(optimizer.prompt.detach(), start().detach(), rtol=0, atol=0)


def test_a_plan_makes_a_run_whose_batches_and_noise_fit_its_statement() -> None:
    _, encoded, loss = setting()
    plan = PrivacyPlan.make(
        PrivacyConfig(epsilon=5.0, max_grad_norm=CLIP, seed=0, batch_size=4, steps=12), 32, batch_size=9, steps=9
    )
    sampler, optimizer = plan.sampler(), plan.optimizer(start(), 0.01)
    for step in range(plan.steps):
        optimizer.update(loss, encoded.batch(sampler.draw(step).tolist()))
    assert optimizer.optimizer.noise_multiplier == plan.statement().noise_multiplier
    assert optimizer.optimizer.expected_batch_size == plan.statement().expected_batch_size == 4
    assert optimizer.prompt.dtype == torch.float32
