"""Laws of generation: a row's tokens don't depend on the rows beside it, and greedy equals Transformers' greedy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from post_server.predictor.detokenizer import IncrementalDetokenizer
from post_shared.errors import InvalidInput
from post_shared.inference.generation import Decoder, DecodingRow, Sampling, continuations, sample
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from tests.models import CAUSAL, TEXTS, tiny_model, tokenizer


def rows_of(
    model: LanguageModel, lengths: list[int], tokens: list[int], sampling: Sampling = Sampling()
) -> list[DecodingRow]:
    """One row per text, with prompts of ``lengths``."""
    return [
        DecodingRow(
            model.tokenizer(text).input_ids,
            model.prefix(SoftPrompt.random(model, length, seed=length).embeddings) if length else None,
            max_tokens,
            sampling,
        )
        for text, length, max_tokens in zip(TEXTS, lengths, tokens, strict=False)
    ]


def run(decoder: Decoder, rows: list[DecodingRow], *, joining: int | None = None) -> list[list[int]]:
    """The tokens of all rows; with ``joining``, that many join at a time, with one step in between."""
    size = joining or len(rows)
    for start in range(0, len(rows), size):
        decoder.add(rows[start : start + size])
        if joining and decoder.rows:
            decoder.step()
    while decoder.rows:
        decoder.step()
    return [[token.id for token in row.made] for row in rows]


def plain(model: LanguageModel, text: str, length: int, max_tokens: int) -> list[int]:
    """Transformers' generation, with the prompt's embeddings in front."""
    inputs = model.embed(torch.tensor([model.tokenizer(text).input_ids]))
    if length:
        inputs = torch.cat([SoftPrompt.random(model, length, seed=length).embeddings[None], inputs], 1)
    ids = model.model.generate(inputs_embeds=inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)[0]
    return [token for token in ids.tolist() if token != model.tokenizer.eos_token_id]


@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_equals_transformers_whichever_rows_join_and_leave(family: str) -> None:
    model = tiny_model(family)
    lengths, tokens = [5, 0, 70, 3, 5, 0, 12, 1], [6, 1, 9, 4, 8, 12, 2, 7]
    expected = [plain(model, *each) for each in zip(TEXTS, lengths, tokens, strict=True)]
    assert run(Decoder(model), rows_of(model, lengths, tokens)) == expected
    assert run(Decoder(model), rows_of(model, lengths, tokens), joining=3) == expected


@pytest.mark.parametrize("length", [0, 6])
def test_continuations_in_a_batch_equal_single_ones_up_to_the_line_break(length: int) -> None:
    model = tiny_model()
    prefix = model.prefix(SoftPrompt.random(model, length, seed=length).embeddings) if length else None
    rows = [model.tokenizer(text).input_ids for text in TEXTS]
    together = continuations(model, rows, prefix, 9)
    assert together == [continuations(model, [row], prefix, 9)[0] for row in rows]
    whole = [model.tokenizer.decode(plain(model, text, length, 9), skip_special_tokens=True) for text in TEXTS]
    assert together == [text.strip().split("\n")[0].strip() for text in whole]


def test_rows_longer_than_the_initial_cache() -> None:
    model = tiny_model("llama")
    rows = rows_of(model, [3, 9], [150, 100])
    assert run(Decoder(model), rows) == [plain(model, TEXTS[0], 3, 150), plain(model, TEXTS[1], 9, 100)]
    assert [row.finish for row in rows] == ["length", "length"]


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    model = tiny_model("llama")
    seeded = Sampling(temperature=1.5, top_p=0.9, seed=7)
    alone = [run(Decoder(model), [row])[0] for row in rows_of(model, [4] * 4, [8] * 4, seeded)]
    assert run(Decoder(model), rows_of(model, [4] * 4, [8] * 4, seeded), joining=2) == alone
    other = run(Decoder(model), rows_of(model, [4] * 4, [8] * 4, Sampling(1.5, 0.9, 8)))
    unseeded = run(Decoder(model), rows_of(model, [4] * 4, [8] * 4, Sampling(1.5)))
    assert alone != other
    assert unseeded not in (alone, other)


def test_samples_follow_the_probabilities_and_top_p_leaves_out_the_tail() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    draws = (torch.arange(1000) + 0.5) / 1000
    logits = probabilities.log().expand(1000, -1)
    squared = probabilities**2

    def shares(**options: float) -> list[float]:
        tokens = sample(logits, [Sampling(**options)] * 1000, draws)  # type: ignore[arg-type]
        return (tokens.bincount(minlength=4) / 1000).tolist()

    assert shares(temperature=1.0) == pytest.approx(probabilities.tolist(), abs=2e-3)
    assert shares(temperature=0.5) == pytest.approx((squared / squared.sum()).tolist(), abs=2e-3)
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=2e-3)
    assert shares(temperature=1.0, top_p=0.0) == [0, 1, 0, 0]
    last = sample(logits[:1], [Sampling(1.0)], torch.tensor([1.0])).item()
    assert last == 0, "the least likely token, not an index beyond"


def test_logprobs_are_those_of_the_model() -> None:
    model = tiny_model("llama")
    (row,) = rows_of(model, [0], [3], Sampling(logprobs=2))
    run(Decoder(model), [row])
    ids = list(row.token_ids)
    for token in row.made:
        logprobs = model.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert token.logprob == pytest.approx(float(logprobs[token.id]), abs=1e-3)
        assert [likely for likely, _ in token.likeliest] == logprobs.topk(2).indices.tolist()
        ids.append(token.id)


def test_a_row_that_a_caller_ends_does_not_affect_the_others() -> None:
    model = tiny_model("llama")
    rows = rows_of(model, [5, 20, 2], [8, 8, 8])
    decoder = Decoder(model)
    decoder.add(rows)
    decoder.step()
    rows[1].finish = "stop"
    decoder.drop_finished()
    while decoder.rows:
        decoder.step()
    assert len(rows[1].made) == 2
    for i, length in ((0, 5), (2, 2)):
        assert [token.id for token in rows[i].made] == plain(model, TEXTS[i], length, 8)
    with pytest.raises(InvalidInput, match="masked"):
        Decoder(tiny_model("bert"))


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=4), max_size=3))
@example("\x80", ["�"])  # half of a character decodes to �, which isn't a stop text
@example("a�", ["�"])
def test_streamed_text_is_complete_and_ends_before_the_first_stop(text: str, stop: list[str]) -> None:
    tokens = tokenizer(masked=False)
    ids = tokens(text).input_ids
    whole = tokens.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    so_far, shown = IncrementalDetokenizer(tokens, before=tokens(" a").input_ids[-1], stop=stop), ""
    for token in ids:
        shown += so_far.push(token)
        assert "�" not in shown or "�" in text
        if so_far.stopped:
            break
    shown += so_far.end()
    ends = [position for each in stop if (position := whole.find(each)) >= 0]
    assert shown == so_far.text == (whole[: min(ends)] if ends else whole)
    assert so_far.stopped == bool(ends)
