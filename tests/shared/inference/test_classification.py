"""Laws of classification in shared batches: each row, with its own prompt, gets the result of the slow path alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput, PromptMismatch
from post_shared.inference.classification import Classified, PromptCache, PromptKey, ServedPrompt, classify_mixed
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import label_words
from tests.models import CAUSAL, MASKED, TEXTS, tiny_model

TWO = Task("{text}, it was", {"negative": ("bad", "terrible"), "positive": ("good", "great")})
THREE = Task("the story is {text} and", {"dull": ("dull",), "fine": ("fine", "nice"), "awful": ("awful",)})
TASKS = (TWO, THREE, TWO, TWO, THREE, TWO, TWO, THREE)


def ready(model: LanguageModel, task: Task, length: int, seed: int = 0) -> ServedPrompt:
    return ServedPrompt.of(model, task, SoftPrompt.random(model, length, seed).embeddings if length else None)


def slow(model: LanguageModel, text: str, prompt: ServedPrompt) -> torch.Tensor:
    """The plain Transformers model: the prompt before one unpadded text, all positions, the whole vocabulary."""
    row = encode_rows(model, prompt.task, [text], model.max_length - prompt.length).rows[0]
    inputs = model.model.get_input_embeddings()(torch.tensor([row.token_ids]))
    if prompt.embeddings is not None:
        inputs = torch.cat([prompt.embeddings[None], inputs], 1)
    logits = model.model(inputs_embeds=inputs).logits[:, row.positions[0] + prompt.length]
    return label_words(model, prompt.task).of(logits).softmax(-1)[0]


def check(model: LanguageModel, prompts: Sequence[ServedPrompt], texts: Sequence[str] = TEXTS) -> None:
    for result, text, prompt in zip(classify_mixed(model, texts, prompts), texts, prompts, strict=True):
        assert result.scores is not None
        assert not result.truncated
        torch.testing.assert_close(torch.tensor(result.scores), slow(model, text, prompt), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", CAUSAL + MASKED)
@pytest.mark.parametrize("lengths", [(7,) * 8, (7, 3, 0, 12, 1, 3, 7, 0)], ids=["one-length", "many-lengths"])
def test_every_row_has_its_own_prompt_and_task(family: str, lengths: Sequence[int]) -> None:
    model = tiny_model(family)
    check(model, [ready(model, TASKS[i], length, seed=i) for i, length in enumerate(lengths)])


def test_prompts_longer_than_the_sliding_window() -> None:
    model = tiny_model("gemma2")
    assert model.config.sliding_window == 64
    check(model, [ready(model, TWO, length, seed=length) for length in (100, 63, 64, 65, 2, 90, 64, 128)])


def test_a_bos_token_comes_after_the_prompt() -> None:
    model = tiny_model("llama", bos=True)
    check(model, [ready(model, TWO, length, seed=length) for length in (4, 9, 4, 9, 1, 2, 3, 0)])


def test_many_rows_of_one_prompt_in_bounded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = tiny_model("llama"), []
    prompt = ready(model, TWO, 5)
    run = model.run_body

    def recording(**inputs: object) -> object:
        sizes.append(inputs["inputs_embeds"].shape[:2])  # type: ignore[attr-defined]
        return run(**inputs)

    monkeypatch.setattr(model, "run_body", recording)
    results = classify_mixed(model, TEXTS * 4, [prompt] * 32, batch_tokens=60)
    assert all(rows * tokens <= 60 for rows, tokens in sizes), "the prompt isn't run again, and no batch is too large"
    for i, result in enumerate(results):
        assert result.scores == pytest.approx(results[i % 8].scores, abs=1e-5)


def test_a_long_text_is_truncated_and_marked() -> None:
    model = tiny_model("llama")
    long = "a film that was nice " * 200
    prompts = [ready(model, TWO, length) for length in (200, 10, 10)]
    results = classify_mixed(model, [long, long, "nice"], prompts)
    assert [result.truncated for result in results] == [True, True, False]
    for result, prompt in zip(results[:2], prompts, strict=False):
        row = encode_rows(model, TWO, [long], model.max_length - prompt.length).rows[0]
        assert len(row.token_ids) + prompt.length <= model.max_length < len(row.token_ids) + prompt.length + 6
        torch.testing.assert_close(torch.tensor(result.scores), slow(model, long, prompt), rtol=1e-4, atol=1e-5)
    shortened = classify_mixed(model, TEXTS[:3], prompts, max_length=8)
    assert [result.truncated for result in shortened] == [False, True, False]
    with pytest.raises(InvalidInput, match="fills"):
        ready(model, TWO, 256)
    with pytest.raises(PromptMismatch):
        ServedPrompt.of(model, TWO, torch.zeros(3, 31))


def test_a_nan_prompt_affects_no_other_row() -> None:
    model = tiny_model("llama")
    good, bad = ready(model, TWO, 4), ServedPrompt.of(model, TWO, torch.full((4, 32), torch.nan))
    results = classify_mixed(model, TEXTS[:3], [good, bad, good])
    assert results[1] == Classified(None, False)
    assert results[0].scores == pytest.approx(classify_mixed(model, TEXTS[:1], [good])[0].scores, abs=1e-5)


def test_the_cache_keeps_its_limit_and_separates_tenants() -> None:
    model, made = tiny_model("llama"), []
    one = ready(model, TWO, 5)
    head = model.hidden_size // 4
    assert one.nbytes == 4 * 5 * (model.hidden_size + model.layers * 2 * 2 * head), "embeddings, keys and values"
    cache = PromptCache(2 * one.nbytes + 1)

    def get(tenant: str, prompt: str, length: int = 5) -> None:
        def make() -> ServedPrompt:
            made.append((tenant, prompt))
            return ready(model, TWO, length)

        cache.get(PromptKey(tenant, "model", prompt), make)
        assert cache.nbytes <= 2 * one.nbytes + 1

    for tenant, prompt in (("a", "p"), ("b", "p"), ("a", "p"), ("a", "q"), ("a", "p"), ("b", "p")):
        get(tenant, prompt)
    assert made == [("a", "p"), ("b", "p"), ("a", "q"), ("b", "p")]
    get("a", "large", 11)
    assert len(cache) == 2, "a prompt larger than the cache evicts nothing"
    get("a", "large", 11)
    assert made[-2:] == [("a", "large")] * 2
    cache.forget(model="model")
    assert (len(cache), cache.nbytes) == (0, 0)
