"""Models larger than a device: with weights on the disk, results and gradients are those of the model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader

from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.engine.devices import parse_memory
from post_shared.engine.offload import weights_of
from post_shared.errors import InvalidInput
from post_shared.inference.classification import ServedPrompt, classify_mixed
from post_shared.inference.evaluation import evaluate
from post_shared.inference.generation import Decoder
from post_shared.inference.generation import DecodingRow as Line
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.memory_plan import saved_per_position
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.training.checkpoint import fingerprint
from tests.models import CAUSAL, LABELS, MASKED, TEXTS, per_row, tiny_model

WORDS = {"negative": ("bad", "terrible"), "positive": ("good", "great")}


def task_for(model: LanguageModel) -> Task:
    return Task("{text}, it was" if model.kind == "causal" else "{text}, it was {mask}", WORDS)


@pytest.fixture(params=CAUSAL + MASKED)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LanguageModel, LanguageModel]:
    """A model in memory, and the same one with most of its layers on the disk."""
    tiny_model(request.param).save(tmp_path)
    plain = LanguageModel.load(tmp_path, device="cpu")
    return plain, LanguageModel.load(tmp_path, device="spread", memory={"cpu": int(0.6 * plain.nbytes)})


def test_answers_and_prompt_gradients_are_those_of_the_model_in_memory(
    both: tuple[LanguageModel, LanguageModel],
) -> None:
    plain, spread = both
    assert "disk" in spread.model.hf_device_map.values()
    assert any(weight.is_meta for weight in spread.model.parameters())
    batch = encode_rows(plain, task_for(plain), TEXTS).batch(range(8))
    tokens, results = torch.tensor([7, 3, 11]), []
    for model in both:
        prompt = SoftPrompt.random(plain, 5, seed=1).embeddings.clone().requires_grad_()
        shared = model.answer_logits(batch, prompt)
        shared.logsumexp(-1).sum().backward()
        shared_gradient = prompt.grad
        prompt.grad = None
        model.answer_logits(batch, per_row(prompt, batch), tokens=tokens).square().sum().backward()
        results.append((shared.detach(), shared_gradient, prompt.grad))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_properties_are_those_of_the_model_in_memory(both: tuple[LanguageModel, LanguageModel]) -> None:
    plain, spread = both
    for actual, expected in zip(weights_of(spread.model), plain.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=0)
    assert fingerprint(spread) == fingerprint(plain)
    assert (spread.nbytes, spread.parameters, spread.device) == (plain.nbytes, plain.parameters, plain.device)
    assert spread.devices == {torch.device("cpu")}
    assert saved_per_position(spread) == saved_per_position(plain)


def test_the_backward_pass_loads_the_weights_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save(tmp_path)
    spread = LanguageModel.load(tmp_path, device="spread", memory={"cpu": 0})
    loaded: list[str] = []
    load = OffloadedWeightsLoader.__getitem__

    def recorded(self: OffloadedWeightsLoader, key: str) -> torch.Tensor:
        loaded.append(key)
        return load(self, key)  # type: ignore[no-any-return]

    batch = encode_rows(spread, task_for(spread), TEXTS).batch(range(8))
    prompt = SoftPrompt.random(spread, 5).embeddings.clone().requires_grad_()
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", recorded)
    answers = spread.answer_logits(batch, per_row(prompt, batch), tokens=torch.tensor([3, 5]))
    in_forward = set(loaded)
    loaded.clear()
    answers.sum().backward()
    matrices = {f"model.layers.{n}.{name}.weight" for n in range(4) for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert matrices <= in_forward
    assert matrices <= set(loaded)
    assert not any(name.startswith("lm_head") for name in loaded)


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_evaluation_serving_and_generation_are_as_in_memory(family: str, tmp_path: Path) -> None:
    tiny_model(family).save(tmp_path)
    plain = LanguageModel.load(tmp_path, device="cpu")
    spread = LanguageModel.load(tmp_path, device="spread", memory={"cpu": 0})
    prompt, task = SoftPrompt.random(plain, 5, seed=2).embeddings, task_for(plain)
    rows = [Row(text, label) for text, label in zip(TEXTS, LABELS, strict=True)]
    assert evaluate(spread, task, rows, prompt) == evaluate(plain, task, rows, prompt)
    served = [
        classify_mixed(model, TEXTS, [ServedPrompt.of(model, task, prompt)] * len(TEXTS)) for model in (plain, spread)
    ]
    for actual, expected in zip(served[1], served[0], strict=True):
        assert actual.scores == pytest.approx(expected.scores, abs=1e-6)
    if family == "llama":
        generated = []
        for model in (plain, spread):
            lines = [Line([5, 6, 7 + at], model.prefix(prompt), 4) for at in range(3)]
            decoder = Decoder(model)
            decoder.add(lines)
            while decoder.rows:
                decoder.step()
            generated.append([line.made for line in lines])
        assert generated[0] == generated[1]


def test_a_model_that_fits_has_no_hooks(tmp_path: Path) -> None:
    tiny_model().save(tmp_path)
    model = LanguageModel.load(tmp_path, device="spread")
    assert not any(weight.is_meta for weight in model.model.parameters())
    assert not hasattr(model.model, "_hf_hook")


def test_memory_is_written_as_device_and_size() -> None:
    assert parse_memory("0=20GiB, 1=500MB,cpu=1.5GB") == {0: 20 * 2**30, 1: 500 * 10**6, "cpu": 1_500_000_000}
    assert parse_memory("") == {}
    for wrong in ("20GiB", "gpu=3", "cpu=3XB", "cpu=-3"):
        with pytest.raises(InvalidInput, match="0=20GiB,cpu=60GiB"):
            parse_memory(wrong)
