"""Laws of the Min-K% attack and of the figures by which it is judged."""

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
    """Random strings of words, 12 to 20 each: two seeds share none."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS.split(), k=draw.randint(12, 20))) for _ in range(count)]


def plain_log_probabilities(model: LanguageModel, text: str) -> torch.Tensor:
    """log p of every token of one text, with the library's own model and nothing of POST's."""
    found = model.tokenizer(text, return_special_tokens_mask=True)
    ids = torch.tensor(found.input_ids)
    if model.kind == "causal":
        logits = model.model(input_ids=ids[None]).logits[0, :-1]
        return logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
    asked = [at for at, special in enumerate(found.special_tokens_mask) if not special]
    values = []
    for at in asked:
        masked = ids.clone()
        masked[at] = model.tokenizer.mask_token_id
        values.append(model.model(input_ids=masked[None]).logits[0, at].log_softmax(-1)[ids[at]])
    return torch.stack(values)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_scores_are_the_models_own_log_probabilities(family: str) -> None:
    """Batched with texts of other lengths: padding changes nothing, and texts keep their order."""
    model, some = tiny_model(family), texts(7, 0)
    rows = token_rows(model, some, 64)
    scores = torch.split(score_tokens(model, rows, batch_size=3)[0], list(rows.counts))
    for text, found in zip(some, scores, strict=True):
        torch.testing.assert_close(found.float(), plain_log_probabilities(model, text), atol=1e-4, rtol=1e-4)


def test_a_text_beside_others_scores_as_it_does_alone() -> None:
    model, some = tiny_model(), texts(6, 0)
    together = text_scores(model, some, 64, batch_size=6)
    alone = torch.cat([text_scores(model, [text], 64) for text in some])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_long_text_is_cut() -> None:
    model, words = tiny_model(), " ".join(["film story"] * 200)
    rows = token_rows(model, [words], 16)
    assert rows.counts == (15,)
    assert len(rows.encoded.rows[0].token_ids) == 15
    with pytest.raises(InvalidInput, match="256 positions"):
        token_rows(model, [words], 300)


def test_with_all_tokens_it_is_the_mean_log_likelihood() -> None:
    model, some = tiny_model(), texts(4, 0)
    every = text_scores(model, some, 64)[:, 0, SHARES.index(1.0)]
    means = torch.stack([plain_log_probabilities(model, text).mean() for text in some])
    torch.testing.assert_close(every.float(), means, atol=1e-4, rtol=1e-4)


def test_min_k_by_hand() -> None:
    values = torch.tensor([-1.0, -9.0, -3.0, -5.0, -2.0])
    assert min_k(values, 0.2) == -9.0
    assert min_k(values, 0.4) == -7.0
    assert min_k(values, 0.01) == -9.0  # one token at least
    assert min_k(values, 1.0) == -4.0


def test_token_scores_by_hand() -> None:
    """p = (1/4, 3/4), log p = (-1.386, -0.288): mean -0.562 under p, deviation 0.476."""
    logits = torch.tensor([[0.25, 0.75]]).log()
    both = token_scores(logits.expand(2, -1), torch.tensor([0, 1]))
    torch.testing.assert_close(both[0], logits[0])
    mean = 0.25 * np.log(0.25) + 0.75 * np.log(0.75)
    deviation = np.sqrt(0.25 * (np.log(0.25) - mean) ** 2 + 0.75 * (np.log(0.75) - mean) ** 2)
    expected = (np.log([0.25, 0.75]) - mean) / deviation
    torch.testing.assert_close(both[1], torch.tensor(expected, dtype=torch.float32))


def test_a_text_of_one_token_has_no_score() -> None:
    with pytest.raises(InvalidInput, match="1 of 2 texts"):
        text_scores(tiny_model(), [*texts(1, 0), "a"], 64)


def memorise(model: LanguageModel, members: list[str]) -> None:
    """Train all weights on the members until they are known."""
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


def test_what_was_memorised_is_found_and_what_was_never_seen_is_not() -> None:
    model, members, others = tiny_model("gpt2", layers=2), texts(40, 1), texts(40, 2)
    usual = SHARES.index(0.2)
    for values in text_scores(model, [*members, *others], 64)[:, :, usual].T.numpy():
        (found,) = bootstrap(lambda a, b: [auc(a, b)], values[:40], values[40:])
        assert found.low < 0.5 < found.high
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


def test_no_more_than_one_in_a_hundred_non_members_is_above_the_threshold() -> None:
    others = np.arange(200.0)
    assert curve_of(np.array([197.0, 197.5, 198.0, 300.0]), others).at(0.01) == 0.75  # 198 and 199 may be above
    assert curve_of(np.array([199.0, 199.5]), np.arange(200.0)).at(0.0) == 0.5
    assert curve_of(np.zeros(5), np.zeros(50)).at(0.01) == 0.0  # a tie is no find


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(40):
        (found,) = bootstrap(lambda some: [some.mean()], generator.normal(size=60), seed=seed)
        assert found.low <= found.value <= found.high
        hits += found.low <= 0.0 <= found.high
    assert hits >= 33  # 38 expected; fewer than 33 has a chance below 1 %


def test_columns_of_a_sample_stay_together() -> None:
    """Two models that differ by the same on every row have a difference without any doubt."""
    first = np.random.default_rng(2).normal(size=50)
    both = np.stack([first, first + 1.0], axis=1)
    _, gap = bootstrap(lambda some: [some[:, 0].mean(), (some[:, 1] - some[:, 0]).mean()], both)
    assert (gap.low, gap.high) == (pytest.approx(1.0), pytest.approx(1.0))
