"""Laws of the Min-K% attack, and of the ROC figures and intervals that measure it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from post_shared.errors import InvalidInput
from post_shared.method.audit.min_k import SHARES, min_k, score_tokens, text_scores, token_rows, token_scores
from post_shared.method.audit.roc import auc, bootstrap, curve_of
from post_shared.model.language_model import LanguageModel
from tests.models import WORDS, tiny_model

FAMILIES = ["llama", "gpt2", "bert"]


def texts(count: int, seed: int) -> list[str]:
    """Random strings of 12 to 20 words; two seeds have none in common."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS.split(), k=draw.randint(12, 20))) for _ in range(count)]


def plain_log_probabilities(model: LanguageModel, text: str) -> torch.Tensor:
    """log p of every token of one text, by the plain Transformers model."""
    encoding = model.tokenizer(text, return_special_tokens_mask=True)
    ids = torch.tensor(encoding.input_ids)
    if model.kind == "causal":
        logits = model.model(input_ids=ids[None]).logits[0, :-1]
        return logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
    predicted = [i for i, is_special in enumerate(encoding.special_tokens_mask) if not is_special]
    values = []
    for i in predicted:
        masked = ids.clone()
        masked[i] = model.tokenizer.mask_token_id
        values.append(model.model(input_ids=masked[None]).logits[0, i].log_softmax(-1)[ids[i]])
    return torch.stack(values)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_scores_are_the_models_own_log_probabilities(family: str) -> None:
    """In batches with texts of other lengths: padding changes nothing, and texts keep their order."""
    model, sample = tiny_model(family), texts(7, 0)
    rows = token_rows(model, sample, 64)
    scores = torch.split(score_tokens(model, rows, batch_size=3)[0], list(rows.counts))
    for text, score in zip(sample, scores, strict=True):
        torch.testing.assert_close(score.float(), plain_log_probabilities(model, text), atol=1e-4, rtol=1e-4)


def test_a_text_in_a_batch_scores_as_it_does_alone() -> None:
    model, sample = tiny_model(), texts(6, 0)
    together = text_scores(model, sample, 64, batch_size=6)
    alone = torch.cat([text_scores(model, [text], 64) for text in sample])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_long_text_is_truncated() -> None:
    model, words = tiny_model(), " ".join(["film story"] * 200)
    rows = token_rows(model, [words], 16)
    assert rows.counts == (15,)
    assert len(rows.encoded.rows[0].token_ids) == 15
    with pytest.raises(InvalidInput, match="256 positions"):
        token_rows(model, [words], 300)


def test_with_all_tokens_it_is_the_mean_log_likelihood() -> None:
    model, sample = tiny_model(), texts(4, 0)
    scores = text_scores(model, sample, 64)[:, 0, SHARES.index(1.0)]
    means = torch.stack([plain_log_probabilities(model, text).mean() for text in sample])
    torch.testing.assert_close(scores.float(), means, atol=1e-4, rtol=1e-4)


def test_min_k_by_hand() -> None:
    values = torch.tensor([-1.0, -9.0, -3.0, -5.0, -2.0])
    assert min_k(values, 0.2) == -9.0
    assert min_k(values, 0.4) == -7.0
    assert min_k(values, 0.01) == -9.0  # at least one token
    assert min_k(values, 1.0) == -4.0


def test_token_scores_by_hand() -> None:
    """p = (1/4, 3/4), log p = (-1.386, -0.288): under p, mean -0.562 and standard deviation 0.476."""
    logits = torch.tensor([[0.25, 0.75]]).log()
    both = token_scores(logits.expand(2, -1), torch.tensor([0, 1]))
    torch.testing.assert_close(both[0], logits[0])
    mean = 0.25 * np.log(0.25) + 0.75 * np.log(0.75)
    deviation = np.sqrt(0.25 * (np.log(0.25) - mean) ** 2 + 0.75 * (np.log(0.75) - mean) ** 2)
    expected = (np.log([0.25, 0.75]) - mean) / deviation
    torch.testing.assert_close(both[1], torch.tensor(expected, dtype=torch.float32))


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(InvalidInput, match="1 of 2 texts"):
        text_scores(tiny_model(), [*texts(1, 0), "a"], 64)


def memorise(model: LanguageModel, members: list[str]) -> None:
    """Train all weights on the members until the model has memorised them."""
    weights = [weight.requires_grad_(True) for weight in model.model.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=3e-3)
    rows = token_rows(model, members, 64)
    batch = rows.encoded.batch(range(len(members)))
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.answer_logits(batch), batch.tokens)
        loss.backward()
        optimizer.step()
    model.model.requires_grad_(False)


def test_memorised_texts_are_detected_and_unseen_texts_are_not() -> None:
    model, members, others = tiny_model("gpt2", layers=2), texts(40, 1), texts(40, 2)
    usual = SHARES.index(0.2)
    for values in text_scores(model, [*members, *others], 64)[:, :, usual].T.numpy():
        (estimate,) = bootstrap(lambda a, b: [auc(a, b)], values[:40], values[40:])
        assert estimate.low < 0.5 < estimate.high
    memorise(model, members)
    for values in text_scores(model, [*members, *others], 64)[:, :, usual].T.numpy():
        assert auc(values[:40], values[40:]) > 0.9
        assert curve_of(values[:40], values[40:]).at(0.01) > 0.2


# --- figures ------------------------------------------------------------------------------------------


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = generator.integers(0, 6, 13).astype(float), generator.integers(0, 6, 17).astype(float)
        pairs = (a[:, None] > b).mean() + (a[:, None] == b).mean() / 2
        assert auc(a, b) == pytest.approx(pairs)
        assert auc(a, b) + auc(b, a) == pytest.approx(1.0)
        assert auc(np.exp(a), np.exp(b)) == auc(a, b)  # only the order counts


def test_the_true_positive_rate_keeps_the_false_positive_rate() -> None:
    others = np.arange(200.0)
    assert curve_of(np.array([197.0, 197.5, 198.0, 300.0]), others).at(0.01) == 0.75  # 198 and 199 may be above
    assert curve_of(np.array([199.0, 199.5]), np.arange(200.0)).at(0.0) == 0.5
    assert curve_of(np.zeros(5), np.zeros(50)).at(0.01) == 0.0  # ties don't count


def test_an_interval_contains_the_true_value_about_as_often_as_its_confidence() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(40):
        (estimate,) = bootstrap(lambda sample: [sample.mean()], generator.normal(size=60), seed=seed)
        assert estimate.low <= estimate.value <= estimate.high
        hits += estimate.low <= 0.0 <= estimate.high
    assert hits >= 33  # 38 expected; the probability of fewer than 33 is below 1 %


def test_columns_of_a_sample_stay_together() -> None:
    """If two models differ by the same amount on every row, the interval of the difference has no width."""
    first = np.random.default_rng(2).normal(size=50)
    both = np.stack([first, first + 1.0], axis=1)
    _, gap = bootstrap(lambda sample: [sample[:, 0].mean(), (sample[:, 1] - sample[:, 0]).mean()], both)
    assert (gap.low, gap.high) == (pytest.approx(1.0), pytest.approx(1.0))
