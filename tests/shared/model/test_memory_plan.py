"""The memory plan: cutting a step into micro-batches that fit changes nothing but its memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from post_shared.data.batches import PASS_COST, EncodedRow, EncodedRows
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.engine.memory_profiler import peak_bytes
from post_shared.errors import OutOfMemory
from post_shared.inference import evaluation
from post_shared.inference.classification import ServedPrompt, classify_mixed
from post_shared.inference.evaluation import generate
from post_shared.inference.generation import continuations as continued
from post_shared.method.tuning.tune import PLAIN_BATCH, PUBLIC_BATCH, plan_tuning, tuning_objective
from post_shared.model import memory_plan
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.memory_plan import free_bytes, held_per_position, plan_pass, plan_step, saved_per_position
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.optimizer import PromptAdam
from tests.models import CAUSAL, LABELS, MASKED, TEXTS, per_row, tiny_model

TASK = Task("{text}, it was", {"negative": ("terrible",), "positive": ("great",)})
CPU = torch.device("cpu")


def rows_of(lengths: list[int]) -> EncodedRows:
    return EncodedRows(tuple(EncodedRow([1] * length, [length - 1], [], None) for length in lengths))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 200))
def test_no_other_cut_of_a_batch_costs_less(lengths: list[int], size: int, tokens: int) -> None:
    batch = rows_of(lengths).batch(range(len(lengths)))
    parts = batch.places(size, tokens=tokens)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    padded = [len(part) * max(lengths[row] for row in part) for part in parts]
    assert all(len(part) <= size for part in parts)
    assert all(len(part) == 1 or count <= tokens for part, count in zip(parts, padded, strict=True))
    ordered = sorted(lengths)

    def least(end: int) -> int:
        """By exhaustive search."""
        counts = [n for n in range(1, min(size, end) + 1) if n == 1 or n * ordered[end - 1] <= tokens]
        return min((least(end - n) + n * ordered[end - 1] + PASS_COST for n in counts), default=0) if end else 0

    assert sum(padded) + PASS_COST * len(parts) == least(len(lengths))


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_a_step_in_parts_is_the_step(family: str) -> None:
    model = tiny_model(family)
    task = TASK if model.kind == "causal" else Task("{text}, it was {mask}", TASK.label_words)
    encoded, loss = encode_rows(model, task, TEXTS, labels=LABELS, reserved=4), tuning_objective(model, task)
    start = torch.randn(4, model.hidden_size) * 0.1
    moved = []
    for tokens in (None, 30, 1):
        adam = PromptAdam(
            nn.Parameter(start.clone()), 0.01, lambda batch, n=tokens: batch.split(len(batch), tokens=n, reserved=4)
        )
        value = adam.update(loss, encoded.batch(range(len(TEXTS))))
        moved.append((value, adam.prompt.grad, adam.prompt.detach()))
    for value, gradient, prompt in moved[1:]:
        assert value == pytest.approx(moved[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, moved[0][1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(prompt, moved[0][2], rtol=0, atol=1e-4)


def test_memory_per_position_grows_with_the_layers_and_excludes_the_weights() -> None:
    small, large = (saved_per_position(tiny_model(layers=layers)) for layers in (2, 6))
    assert 2.0 < large / small < 4.0
    wide = tiny_model(layers=2)
    assert small < sum(weight.nbytes for weight in wide.model.parameters())
    assert all(weight.grad is None for weight in wide.model.parameters())


def test_a_plan_fits_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    per_position = saved_per_position(model)
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: 100 * per_position)
    plan = plan_step(model, longest=20)
    assert plan.positions == 60
    assert plan.bytes == 60 * per_position
    with pytest.raises(OutOfMemory, match=r"61 positions.*MB are free on cpu"):
        plan_step(model, longest=61)
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: 10**12)
    assert plan_step(model, longest=20, max_bytes=50 * per_position).positions == 50
    assert plan_step(model, longest=900, max_bytes=50 * per_position).positions == 900


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_a_plain_step_and_its_label_bias_fit_together(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_model(family), TuneOptions(num_virtual_tokens=4, max_length=32)
    task = TASK if model.kind == "causal" else Task("{text}, it was {mask}", TASK.label_words)
    rows = [Row(f"{text} {at}", LABELS[0]) for at, text in enumerate(TEXTS * 9)]
    encoded = encode_rows(model, task, [row.text for row in rows], 32, reserved=4)
    longest, per_position = 4 + encoded.whole.longest, saved_per_position(model)
    for several in (1, 3):
        reserved = (PLAIN_BATCH + several) * longest
        monkeypatch.setattr(
            memory_plan,
            "free_bytes",
            lambda _, reserved=reserved: int((reserved + 0.5) * per_position / memory_plan.SHARE),
        )
        split, calibrated = plan_tuning(model, task, rows, None, encoded, config, private=False)
        assert calibrated is not None
        assert calibrated.batches.batch_size == PLAIN_BATCH, "the result doesn't depend on the memory"
        for part in split(encoded.whole):
            assert config.num_virtual_tokens + sum(map(encoded.length, part.index)) <= reserved - calibrated.held
    monkeypatch.setattr(
        memory_plan, "free_bytes", lambda _: int(PLAIN_BATCH * longest * per_position / memory_plan.SHARE)
    )
    with pytest.raises(OutOfMemory):
        plan_tuning(model, task, rows, None, encoded, config, private=False)
    _, private = plan_tuning(model, task, rows, [row.text for row in rows], encoded, config, private=True)
    assert private is not None
    assert private.batches.batch_size == PUBLIC_BATCH, "a private run doesn't depend on the free memory"
    assert private.held == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_packed_step_with_a_long_prompt_takes_the_planned_memory(family: str) -> None:
    model = tiny_model(family)
    encoded, loss = encode_rows(model, TASK, TEXTS * 8, labels=LABELS * 8, reserved=40), tuning_objective(model, TASK)
    plan, batch = plan_step(model, longest=60), encoded.whole
    positions = 40 + sum(encoded.length(row) for row in batch.index)
    prompt = torch.randn(40, model.hidden_size).mul(0.1).requires_grad_()
    kept = memory_plan.kept_bytes(lambda: loss(prompt, batch), model.model.parameters())
    texts = len(batch) * 40 * plan.prompt_copy
    assert kept <= 1.15 * (positions + texts) * plan.per_position
    cut = replace(plan, positions=positions).cut(40, packed=True)
    assert len(cut(batch)) > 1, "each text's own keys and values of the prompt count"


def test_a_control_groups_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "CGROUP", tmp_path)
    unlimited = free_bytes(CPU)
    assert unlimited > 10**6
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert free_bytes(CPU) > 10**6
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_bytes(CPU) == 995
    (tmp_path / "memory.current").write_text("2000\n")
    assert free_bytes(CPU) == 0


def test_texts_of_all_lengths_behind_one_prompt_keep_their_order() -> None:
    model: LanguageModel = tiny_model()
    encoded = encode_rows(model, TASK, [*TEXTS, " ".join(TEXTS) * 2], reserved=4)
    batch, prompt = encoded.batch([8, 2, 4, 0, 5, 8, 1]), torch.randn(4, model.hidden_size)
    assert len(batch.places(len(batch))) > 1
    torch.testing.assert_close(
        model.answer_logits(batch, prompt), model.answer_logits(batch, per_row(prompt, batch)), rtol=1e-4, atol=1e-5
    )
    prompts, index = torch.randn(3, 4, model.hidden_size), torch.tensor([0, 2, 1, 1, 0, 2, 0])
    torch.testing.assert_close(
        model.answer_logits(batch, prompts, prompt_index=index),
        model.answer_logits(batch, prompts[index]),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("family", CAUSAL + MASKED)
def test_memory_per_position_predicts_that_of_a_batch(family: str) -> None:
    model = tiny_model(family)

    @torch.no_grad()
    def peak(rows: int, tokens: int) -> int:
        return peak_bytes(lambda: model.hidden(torch.full((rows, tokens), 7)))

    measured = (peak(6, 40) - peak(1, 16)) / (6 * 40 - 16)
    assert 0.6 * measured < held_per_position(model) < 1.6 * measured
    assert held_per_position(tiny_model(family, layers=8)) < 1.2 * held_per_position(model), (
        "the activations of one layer at a time"
    )


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_with_little_memory_answers_are_the_same_in_smaller_batches(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    task = TASK if model.kind == "causal" else Task("{text}, it was {mask}", TASK.label_words)
    served = [ServedPrompt.of(model, task, torch.randn(7, model.hidden_size))] * len(TEXTS)
    ample = classify_mixed(model, TEXTS, served)
    sizes: list[int] = []
    run = model.run_body
    monkeypatch.setattr(model, "run_body", lambda **inputs: sizes.append(len(inputs["inputs_embeds"])) or run(**inputs))
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: int(100 * held_per_position(model)))
    sizes.clear()
    small = classify_mixed(model, TEXTS, served)
    assert max(sizes) < len(TEXTS)
    for actual, expected in zip(small, ample, strict=True):
        assert actual.scores == pytest.approx(expected.scores, abs=1e-5)
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: 10 * held_per_position(model))
    with pytest.raises(OutOfMemory, match=r"positions\) takes .* MB are free on cpu"):
        classify_mixed(model, TEXTS, served)


def test_with_little_memory_free_answers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = tiny_model(), Task("{text} is")
    prompt = torch.randn(5, model.hidden_size)
    ample = generate(model, task, TEXTS, prompt, max_new_tokens=4, max_length=32)
    plan = plan_pass(model, longest=41, kept=2 * model.prefix(torch.zeros(1, model.hidden_size)).nbytes)
    sizes: list[int] = []
    recorded = lambda model, rows, *more: sizes.append(len(rows)) or continued(model, rows, *more)  # noqa: E731
    monkeypatch.setattr(evaluation, "continuations", recorded)
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: int(3.5 * 41 * plan.per_position / memory_plan.SHARE))
    assert generate(model, task, TEXTS, prompt, max_new_tokens=4, max_length=32) == ample
    assert max(sizes) == 3
