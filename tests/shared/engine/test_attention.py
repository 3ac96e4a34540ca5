"""Shared key/value heads give the same attention and keep less for the backward pass."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from post_shared.data.batches import EncodedRow, EncodedRows
from post_shared.engine import attention
from post_shared.model.language_model import LanguageModel
from post_shared.model.memory_plan import kept_bytes
from tests.models import tokenizer

GROUPED = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def test_behind_a_shared_prompt_results_are_the_same_and_less_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = LanguageModel(AutoModelForCausalLM.from_config(GROUPED), tokenizer(masked=False))
    rows = EncodedRows(tuple(EncodedRow(list(range(1, length)), [length - 2], [], None) for length in (9, 6, 4)))
    prompt = torch.linspace(-1, 1, 5 * 32).reshape(5, 32).requires_grad_()

    def logits_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model.answer_logits(rows.whole, prompt)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), prompt)[0]

    def kept() -> int:
        return kept_bytes(lambda: model.answer_logits(rows.whole, prompt), model.model.parameters())

    actual, less = logits_and_gradient(), kept()
    monkeypatch.setattr(attention, "_shares_heads", lambda *_: False)
    expected, more = logits_and_gradient(), kept()
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-6)  # heads are summed in another order
    assert less < more


@pytest.mark.parametrize(
    ("length", "masked", "options"),
    [(1, True, {}), (3, False, {}), (3, True, {"position_bias": torch.ones(1, 4, 3, 3)})],
)
def test_all_other_calls_are_left_to_transformers(length: int, masked: bool, options: dict[str, torch.Tensor]) -> None:
    query, key = torch.linspace(-1, 1, 4 * length * 8).reshape(1, 4, length, 8), torch.ones(1, 2, 3, 8)
    mask = torch.ones(1, 1, length, 3, dtype=torch.bool).tril() if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    output = attention.attention(module, query, key, key, mask, **options)[0]
    assert torch.equal(output, sdpa_attention_forward(module, query, key, key, mask, **options)[0])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_backward_pass_of_16_bit_attention_is_in_float32(
    monkeypatch: pytest.MonkeyPatch, *, masked: bool, dtype: torch.dtype
) -> None:
    """In bfloat16 the CPU kernel's backward pass takes up to ten times as long, and rounds more."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 6, 8).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril() if masked else None
    module, output = torch.nn.Module(), torch.randn(2, 6, 4, 8)
    module.num_key_value_groups, module.is_causal = 2, True  # type: ignore[assignment]
    kernel, calls = torch.nn.functional.scaled_dot_product_attention, list[tuple[torch.dtype, bool]]()

    def recorded(*tensors: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append((tensors[0].dtype, torch.is_grad_enabled()))
        return kernel(*tensors, **options)  # type: ignore[arg-type]

    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = attention.attention(module, *wide, mask, scaling=0.3)[0]
    expected_gradients = torch.autograd.grad((expected * output).sum(), wide)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):  # rotary embeddings are float32 there
        mixed = attention.attention(module, *inputs, mask, scaling=0.3)[0]
        gradients = torch.autograd.grad((mixed * output).sum(), inputs)
    assert calls == [(dtype, False), (torch.float32, True)]
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), expected, rtol=0.02, atol=0.02)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert actual.dtype == dtype
        assert (actual - wanted).norm() < 0.01 * wanted.norm()
    with torch.no_grad():
        attention.attention(module, *inputs, mask, scaling=0.3)
    assert calls[2:] == [(dtype, False)]  # without gradients nothing is computed in float32


def test_additive_and_boolean_masks_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 6, 8).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    boolean = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    additive = torch.zeros(1, 1, 6, 6, dtype=torch.bfloat16).masked_fill(~boolean, float("-inf"))
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    from_boolean, from_additive = (
        torch.autograd.grad(attention.attention(module, *inputs, mask, scaling=0.3)[0].sum(), inputs)
        for mask in (boolean, additive)
    )
    for one, other in zip(from_boolean, from_additive, strict=True):
        torch.testing.assert_close(one, other)
