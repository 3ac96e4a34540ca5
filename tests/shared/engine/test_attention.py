"""Shared key/value heads are the same attention, with less kept for the way back."""

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


def test_behind_a_shared_prompt_the_same_to_the_last_bit_and_less_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = LanguageModel(AutoModelForCausalLM.from_config(GROUPED), tokenizer(masked=False))
    rows = EncodedRows(tuple(EncodedRow(list(range(1, length)), [length - 2], [], None) for length in (9, 6, 4)))
    prompt = torch.linspace(-1, 1, 5 * 32).reshape(5, 32).requires_grad_()

    def logits_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model.answer_logits(rows.whole, prompt)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), prompt)[0]

    def kept() -> int:
        return kept_bytes(lambda: model.answer_logits(rows.whole, prompt), model.model.parameters())

    found, less = logits_and_gradient(), kept()
    monkeypatch.setattr(attention, "_shares", lambda *_: False)
    expected, more = logits_and_gradient(), kept()
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)  # heads are summed in another order
    assert less < more


@pytest.mark.parametrize(
    ("length", "masked", "said"), [(1, True, {}), (3, False, {}), (3, True, {"position_bias": torch.ones(1, 4, 3, 3)})]
)
def test_all_else_is_left_to_transformers(length: int, masked: bool, said: dict[str, torch.Tensor]) -> None:
    query, key = torch.linspace(-1, 1, 4 * length * 8).reshape(1, 4, length, 8), torch.ones(1, 2, 3, 8)
    mask = torch.ones(1, 1, length, 3, dtype=torch.bool).tril() if masked else None
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    found = attention.attention(module, query, key, key, mask, **said)[0]
    assert torch.equal(found, sdpa_attention_forward(module, query, key, key, mask, **said)[0])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_sixteen_bit_numbers_go_back_in_float32(
    monkeypatch: pytest.MonkeyPatch, *, masked: bool, given: torch.dtype
) -> None:
    """The CPU's kernel takes ten times as long for the way back in bfloat16, and rounds more."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 6, 8).to(given).requires_grad_() for heads in (4, 2, 2)]
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril() if masked else None
    module, output = torch.nn.Module(), torch.randn(2, 6, 4, 8)
    module.num_key_value_groups, module.is_causal = 2, True  # type: ignore[assignment]
    kernel, seen = torch.nn.functional.scaled_dot_product_attention, list[tuple[torch.dtype, bool]]()

    def watched(*given: torch.Tensor, **said: object) -> torch.Tensor:
        seen.append((given[0].dtype, torch.is_grad_enabled()))
        return kernel(*given, **said)  # type: ignore[arg-type]

    wide = [each.detach().float().requires_grad_() for each in inputs]
    expected = attention.attention(module, *wide, mask, scaling=0.3)[0]
    right = torch.autograd.grad((expected * output).sum(), wide)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16, enabled=given == torch.float32):  # rotations are float32 there
        mixed = attention.attention(module, *inputs, mask, scaling=0.3)[0]
        found = torch.autograd.grad((mixed * output).sum(), inputs)
    assert seen == [(given, False), (torch.float32, True)]
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), expected, rtol=0.02, atol=0.02)
    for ours, theirs in zip(found, right, strict=True):
        assert ours.dtype == given
        assert (ours - theirs).norm() < 0.01 * theirs.norm()
    with torch.no_grad():
        attention.attention(module, *inputs, mask, scaling=0.3)
    assert seen[2:] == [(given, False)]  # nothing is widened for a pass that isn't gone back through


def test_a_mask_that_is_added_goes_back_as_one_that_hides() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 6, 8).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    seen = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    added = torch.zeros(1, 1, 6, 6, dtype=torch.bfloat16).masked_fill(~seen, float("-inf"))
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    hides, adds = (
        torch.autograd.grad(attention.attention(module, *inputs, mask, scaling=0.3)[0].sum(), inputs)
        for mask in (seen, added)
    )
    for one, other in zip(hides, adds, strict=True):
        torch.testing.assert_close(one, other)
