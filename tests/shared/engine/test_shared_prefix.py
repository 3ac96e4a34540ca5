"""Rows behind one run of a prompt have the gradients that they have behind runs of their own, and nothing of others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from post_shared.data.batches import Batch
from post_shared.data.tasks import Task
from post_shared.engine.shared_prefix import SharedPrefix, can_share_prefix
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel, Prompt, embeddings_of
from post_shared.model.soft_prompt import SoftPrompt
from tests.models import CAUSAL, LABELS, MASKED, TEXTS, tiny_model

TASK = Task("{text}, it was", {"positive": ("good", "great"), "negative": ("bad", "terrible")})
LENGTH = 5


def setting(family: str) -> tuple[LanguageModel, Tensor, Batch]:
    model = tiny_model(family, layers=3)
    return model, SoftPrompt.random(model, LENGTH, seed=1).embeddings, _batch(model)


def _batch(model: LanguageModel) -> Batch:
    return encode_rows(model, TASK, TEXTS, 64, labels=LABELS, reserved=LENGTH).batch(range(len(TEXTS)))


def value(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)[:, 7]  # (B, V) -> (B,)


@pytest.mark.parametrize("family", CAUSAL)
def test_gradients_are_those_behind_runs_of_their_own(family: str) -> None:
    model, prompt, batch = setting(family)
    leaf = prompt.repeat(len(batch), 1, 1).requires_grad_()
    expected = value(model.answer_logits(batch, leaf))
    (each,) = torch.autograd.grad(expected.sum(), leaf)
    shared = SharedPrefix(model, prompt)
    rows = shared.rows(len(batch))
    found = value(model.answer_logits(batch, rows))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(shared.back(rows.gradients(found)), each, rtol=1e-3, atol=1e-4 * float(each.abs().max()))


def test_what_a_loss_does_with_the_prompt_itself_counts() -> None:
    model, prompt, batch = setting("llama")

    def loss(prompts: Prompt) -> Tensor:
        own = embeddings_of(prompts).pow(3).flatten(1).sum(1)
        return value(model.answer_logits(batch, prompts)) + own * torch.arange(len(batch))

    leaf = prompt.repeat(len(batch), 1, 1).requires_grad_()
    (each,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    shared = SharedPrefix(model, prompt)
    rows = shared.rows(len(batch))
    found = loss(rows)
    torch.testing.assert_close(shared.back(rows.gradients(found)), each, rtol=1e-3, atol=1e-4 * float(each.abs().max()))


def test_a_row_without_a_number_leaves_the_others_as_they_are() -> None:
    model, prompt, batch = setting("llama")
    shared = SharedPrefix(model, prompt)

    def back(broken: int | None) -> Tensor:
        rows = shared.rows(len(batch))
        losses = value(model.answer_logits(batch, rows))
        if broken is not None:
            losses = losses * torch.ones(len(batch)).index_fill(0, torch.tensor(broken), float("nan"))
        return shared.back(rows.gradients(losses))

    sound, broken = back(None), back(3)
    assert not torch.isfinite(broken[3]).any()
    others = [at for at in range(len(batch)) if at != 3]
    torch.testing.assert_close(broken[others], sound[others], rtol=0, atol=0)


def test_what_rows_keep_until_they_go_back_is_no_larger_than_it_says() -> None:
    model, prompt, batch = setting("llama")
    rows = SharedPrefix(model, prompt).rows(len(batch))
    found = rows.gradients(value(model.answer_logits(batch, rows)))
    assert [each.untyped_storage().nbytes() for each in found] == [each.nbytes for each in found]


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED])
def test_a_masked_models_prompt_sees_the_text(family: str) -> None:
    assert can_share_prefix(tiny_model(family, layers=2), LENGTH, 64) == (family in CAUSAL)
    assert can_share_prefix(tiny_model(family, layers=2), 1) == (family in CAUSAL)


def test_positions_that_are_scaled_by_how_many_there_are_need_a_run_for_each_row() -> None:
    """The prompt alone is short, and with a text it isn't: its keys would be turned otherwise."""
    model = tiny_model("llama", layers=2)
    half = model.config.head_dim // 2
    model.config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 22,
        "short_factor": [1.0] * half,
        "long_factor": [9.0] * half,
    }
    model = LanguageModel(type(model.model)(model.config), model.tokenizer)
    assert can_share_prefix(model, LENGTH, 22 - LENGTH)
    assert not can_share_prefix(model, LENGTH, 64)


def test_a_model_that_goes_back_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried on a few tokens is the gradient, not just that there is one."""
    model, back = tiny_model("llama", layers=2), SharedPrefix.back
    monkeypatch.setattr(SharedPrefix, "back", lambda self, some: 1.01 * back(self, some))
    assert not can_share_prefix(model, LENGTH)
