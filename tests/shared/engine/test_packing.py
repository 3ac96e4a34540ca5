"""Packed rows: one pass for prompts and texts of all lengths, and no text sees another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from post_shared.data.batches import EncodedRow, EncodedRows
from post_shared.data.tasks import Task
from post_shared.engine import attention
from post_shared.engine.packing import Packing, Texts
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.memory_plan import filled
from post_shared.model.soft_prompt import SoftPrompt
from tests.models import CAUSAL, MASKED, TEXTS, per_row, tiny_model, tokenizer

TASK = Task("{text}, it was", {"negative": ("terrible",), "positive": ("great",)})
WITHOUT = {"bloom", "gemma2"}
"""Families with their own attention."""


def rows_of(*rows: list[int]) -> EncodedRows:
    return EncodedRows(tuple(EncodedRow(ids, [len(ids) - 1], [], None) for ids in rows))


@pytest.mark.parametrize("family", CAUSAL + MASKED)
def test_which_families_pack(family: str) -> None:
    model = tiny_model(family)
    assert model.packs == (model.max_length if family in set(CAUSAL) - WITHOUT else 0)


def test_prompts_and_texts_of_all_lengths_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model: LanguageModel = tiny_model()
    batch, prompt = encode_rows(model, TASK, TEXTS).batch(range(8)), SoftPrompt.random(model, 7).embeddings
    assert model.packs
    positions: list[int] = []
    run = model.run_body

    def counted(**inputs: torch.Tensor) -> object:
        positions.append(inputs["inputs_embeds"].shape[1])
        return run(**inputs)

    monkeypatch.setattr(model, "run_body", counted)
    model.answer_logits(batch, prompt)
    (run_positions,) = positions
    needed = 7 + sum(len(row.token_ids) for row in batch.encoded.rows)
    assert needed <= run_positions < 7 + len(batch) * batch.longest


def test_no_text_sees_another() -> None:
    model: LanguageModel = tiny_model()
    prompt = SoftPrompt.random(model, 5).embeddings
    one = model.answer_logits(rows_of([5, 6, 7], [8, 9, 10], [11, 12, 13, 14, 15, 16, 17, 18, 19]).whole, prompt)
    other = model.answer_logits(rows_of([5, 6, 7], [20, 21, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9]).whole, prompt)
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


def test_one_mask_for_the_whole_row_equals_its_groups() -> None:
    texts = [Texts(2, 3, torch.tensor([1, 0])), Texts(3, 5, torch.tensor([2, 0, 1]))]
    row = Packing(3, 4, texts, torch.device("cpu"))
    length = 3 * 4 + 2 * 3 + 3 * 5
    query, key, value = torch.randn(3, 1, 2, length, 8)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    assert row.mask.shape == (1, 1, length, length)
    torch.testing.assert_close(attend(query, key, value, row.mask), row.attend(attend, query, key, value))


def test_an_attention_without_packing_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, attention.NAME, sdpa_attention_forward)
    assert tiny_model().packs == 0


def test_rows_longer_than_a_sliding_window_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=50, num_key_value_heads=2, sliding_window=9, **sizes)
    model = LanguageModel(AutoModelForCausalLM.from_config(config), tokenizer(masked=False))
    assert model.packs == 9
    prompt = torch.linspace(-1, 1, 4 * 32).reshape(4, 32)
    for longest in (5, 6):
        batch = rows_of([1, 2, 3], list(range(1, longest + 1))).whole
        actual = model.answer_logits(batch, prompt)
        torch.testing.assert_close(actual, model.answer_logits(batch, per_row(prompt, batch)), rtol=1e-4, atol=1e-5)


def test_micro_batches_are_filled_and_hold_every_row_once() -> None:
    batch = rows_of(*([1] * length for length in (9, 2, 5, 3, 30, 4))).whole
    parts = filled(batch, 14)
    assert sorted(row for part in parts for row in part.index) == list(range(6))
    assert [sorted(len(batch.encoded.rows[row].token_ids) for row in part.index) for part in parts] == [
        [2, 3, 4, 5],
        [9],
        [30],
    ]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    limit=st.integers(1, 120),
    per_row=st.integers(0, 3),
)
def test_the_largest_micro_batch_is_as_small_as_their_number_allows(
    lengths: list[int], limit: int, per_row: int
) -> None:
    batch = rows_of(*([1] * length for length in lengths)).whole

    def sizes(tokens: int) -> list[int]:
        return [sum(lengths[row] + per_row for row in part.index) for part in filled(batch, tokens, per_row=per_row)]

    parts = sizes(limit)
    assert sum(parts) == sum(lengths) + per_row * len(lengths)
    assert max(parts) <= max(limit, max(lengths) + per_row)
    if max(lengths) + per_row < max(parts):  # then it isn't a single row, and a lower limit needs more parts
        assert len(sizes(max(parts) - 1)) > len(parts)


def test_two_micro_batches_share_a_step_evenly() -> None:
    batch = rows_of(*([1] * 10 for _ in range(10))).whole
    assert [len(part) for part in filled(batch, 90)] == [5, 5]
