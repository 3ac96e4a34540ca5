"""On every family, the wrapper computes what the plain model computes row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from post_shared.data.tasks import Task
from post_shared.engine.devices import choose_device
from post_shared.errors import InvalidInput, PromptMismatch
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from tests.models import CAUSAL, LABELS, MASKED, TEXTS, per_row, tiny_model

TASK = Task("{text}, it was", {"negative": ("bad", "terrible"), "positive": ("good", "great")})


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=CAUSAL + MASKED)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(request.param)


def single_rows(model: LanguageModel, prompts: list[torch.Tensor | None]) -> torch.Tensor:
    """The reference: the plain Transformers model, one row at a time, all positions, unpadded."""
    encoded = encode_rows(model, TASK, TEXTS)
    answers = []
    for row, prompt in zip(encoded.rows, prompts, strict=True):
        inputs = model.model.get_input_embeddings()(torch.tensor([row.token_ids]))
        shift = 0
        if prompt is not None:
            inputs, shift = torch.cat([prompt[None], inputs], 1), prompt.shape[0]
        answers.append(model.model(inputs_embeds=inputs).logits[0, row.positions[0] + shift])
    return torch.stack(answers)


def test_without_a_prompt_it_equals_the_plain_model_on_token_ids(model: LanguageModel) -> None:
    encoded = encode_rows(model, TASK, TEXTS)
    plain = [model.model(torch.tensor([r.token_ids])).logits[0, r.positions[0]] for r in encoded.rows]
    close(model.answer_logits(encoded.batch(range(8))), torch.stack(plain))


def test_padded_batch_equals_single_rows_for_every_kind_of_prompt(model: LanguageModel) -> None:
    batch = encode_rows(model, TASK, TEXTS).batch(range(8))
    one = SoftPrompt.random(model, 5, seed=1).embeddings
    many = torch.stack([SoftPrompt.random(model, 5, seed=s).embeddings for s in range(8)])
    close(model.answer_logits(batch), single_rows(model, [None] * 8))
    close(model.answer_logits(batch, per_row(one, batch)), single_rows(model, [one] * 8))
    close(model.answer_logits(batch, many), single_rows(model, list(many)))
    assert (model.answer_logits(batch, per_row(one, batch)) - model.answer_logits(batch)).abs().max() > 1e-2


def test_head_of_hidden_states_equals_the_whole_model(model: LanguageModel) -> None:
    ids = torch.tensor([encode_rows(model, TASK, TEXTS).rows[1].token_ids])
    close(model.head(model.hidden(ids)), model.model(ids).logits.float())


@pytest.mark.parametrize("family", CAUSAL)
def test_prefix_equals_running_the_prompt_again(family: str) -> None:
    model = tiny_model(family)
    batch = encode_rows(model, TASK, TEXTS).batch(range(8))
    prompt = SoftPrompt.random(model, 7, seed=2).embeddings
    prefix = model.prefix(prompt)
    for _ in range(2):  # the second time checks that the first left the prefix unchanged
        close(model.answer_logits(batch, prefix), model.answer_logits(batch, per_row(prompt, batch)))


@pytest.mark.parametrize("index", [None, [2, 0, 0, 1, 2, 2, 1, 0]], ids=["one", "three"])
def test_prompts_run_once_give_the_logits_and_gradients_of_one_run_per_row(
    model: LanguageModel, index: list[int] | None
) -> None:
    batch = encode_rows(model, TASK, TEXTS).batch(range(8))
    prompt_index = None if index is None else torch.tensor(index)
    start = torch.stack([SoftPrompt.random(model, 7, seed=seed).embeddings for seed in (2, 3, 4)])
    once, repeated = ((start[0] if index is None else start).clone().requires_grad_() for _ in range(2))
    shared = model.answer_logits(batch, once, prompt_index=prompt_index)
    plain = model.answer_logits(batch, per_row(repeated, batch) if prompt_index is None else repeated[prompt_index])
    close(shared, plain)
    weights = torch.randn(shared.shape, generator=torch.Generator().manual_seed(0))
    for logits in (shared, plain):
        (logits * weights).sum().backward()
    assert once.grad is not None
    assert repeated.grad is not None
    torch.testing.assert_close(once.grad, repeated.grad, rtol=1e-3, atol=1e-4 * float(repeated.grad.abs().max()))


def test_gradient_reaches_the_prompt_and_no_weight(model: LanguageModel) -> None:
    prompt = SoftPrompt.random(model, 4).embeddings.requires_grad_()
    model.answer_logits(encode_rows(model, TASK, TEXTS).batch(range(8)), prompt).logsumexp(-1).sum().backward()
    assert prompt.grad is not None
    assert prompt.grad.abs().min() >= 0
    assert prompt.grad.norm() > 0
    assert all(weight.grad is None for weight in model.model.parameters())


def test_saved_and_loaded_is_the_same_model(model: LanguageModel, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model.save(tmp_path)
    again = LanguageModel.load(tmp_path, device="cpu")
    assert (again.kind, again.hidden_size, again.layers) == (model.kind, model.hidden_size, model.layers)
    batch, other = (encode_rows(m, TASK, TEXTS).batch(range(8)) for m in (model, again))
    close(again.answer_logits(other), model.answer_logits(batch))
    assert not list(tmp_path.glob("*.bin"))


def test_a_bos_token_stays_first_and_the_prompt_goes_before_it() -> None:
    model = tiny_model("llama", bos=True)
    encoded = encode_rows(model, TASK, TEXTS)
    assert all(row.token_ids[0] == model.tokenizer.bos_token_id for row in encoded.rows)
    close(model.answer_logits(encoded.batch(range(8))), single_rows(model, [None] * 8))


def test_positions_of_the_roberta_table_are_counted_correctly() -> None:
    assert tiny_model("roberta").max_length == 257  # 258 entries, padding_idx 0, so positions start at 1
    assert tiny_model("llama").max_length == 256


def test_wrong_width_missing_folder_and_unknown_device_are_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model("llama")
    with pytest.raises(PromptMismatch, match="width 31"):
        model.answer_logits(encode_rows(model, TASK, TEXTS).batch([0]), torch.zeros(3, 31))
    with pytest.raises(InvalidInput, match="can't load"):
        LanguageModel.load(tmp_path / "nothing")
    with pytest.raises(InvalidInput, match="not a device"):
        choose_device("quantum")
    with pytest.raises(InvalidInput, match="masked"):
        tiny_model("bert").prefix(torch.zeros(3, 32))
    assert len(LABELS) == len(TEXTS)


def test_a_model_for_training_computes_in_what_was_measured_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save(tmp_path)
    monkeypatch.setattr("post_shared.engine.precision.NARROW", 1)
    monkeypatch.setattr("post_shared.engine.precision.time_share", lambda *_: 0.5)
    fast = LanguageModel.load(tmp_path, device="cpu", for_training=True)
    assert fast.dtype is torch.bfloat16
    assert fast.precision.document() == {
        "dtype": "bfloat16",
        "reason": "measured: 2.0 times as fast as float32 (training)",
    }
    assert LanguageModel.load(tmp_path, device="cpu").dtype is torch.float32
    assert LanguageModel.load(tmp_path, device="cpu", dtype=torch.float32, for_training=True).dtype is torch.float32
    monkeypatch.setattr("post_shared.engine.precision.time_share", lambda *_: 1.2)
    assert LanguageModel.load(tmp_path, device="cpu", for_training=True).dtype is torch.float32
