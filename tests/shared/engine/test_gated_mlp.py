"""Gated blocks that recompute activations give the same results; a head at some tokens equals the whole head there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from post_shared.engine.gated_mlp import recompute_activations
from post_shared.model.language_model import LanguageModel
from tests.models import CAUSAL, MASKED, tiny_model

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def kept_and_gradients(model: nn.Module) -> tuple[int, list[torch.Tensor]]:
    """Bytes that a pass keeps, and the gradients of its input and of all weights."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = torch.linspace(-1, 1, 3 * 7 * 16).reshape(3, 7, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(inputs_embeds=inputs).logits
    leaves = [inputs, *(weight for weight in model.parameters() if weight.requires_grad)]
    gradients = torch.autograd.grad(logits.square().sum(), leaves, allow_unused=True)
    return sum(kept.values()), [torch.zeros(1) if gradient is None else gradient for gradient in gradients]


@pytest.mark.parametrize("trained", [False, True])
def test_values_and_gradients_are_the_same_to_the_last_bit_and_less_is_kept(trained: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval().requires_grad_(trained)
    slim = copy.deepcopy(model)
    recompute_activations(slim)
    assert any("forward" in vars(module) for module in slim.modules())
    more, expected = kept_and_gradients(model)
    less, actual = kept_and_gradients(slim)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert less < more or trained  # a trained down_proj keeps its own input


def test_a_copy_of_such_a_model_is_independent() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    recompute_activations(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    ids = torch.tensor([[1, 2, 3]])
    assert float(other(ids).logits.abs().max()) == 0.0
    assert float(model(ids).logits.abs().max()) > 0.0


def test_a_block_that_does_something_else_is_left_alone() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
            self.act_fn = nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]

    block = Other()
    recompute_activations(block)
    assert "forward" not in vars(block)


@pytest.mark.parametrize("family", CAUSAL + MASKED)
def test_a_head_at_some_tokens_gives_the_logits_of_the_whole_head_there(family: str) -> None:
    model: LanguageModel = tiny_model(family)
    hidden = torch.randn(5, model.hidden_size, requires_grad=True)
    tokens = torch.tensor([7, 3, 11])
    whole, some = model.head(hidden)[:, tokens], model.head(hidden, tokens)
    torch.testing.assert_close(some, whole, rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(whole.square().sum(), hidden, retain_graph=True)
    (actual,) = torch.autograd.grad(some.square().sum(), hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert model.head(hidden).shape == (5, model.vocabulary)
