"""Passes that are replayed give what they give run as they are. The graphs themselves: ``tests/test_cuda.py``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from post_client.tuning.tune import tune
from post_shared.data.batches import EncodedRows
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.engine.cuda_graphs import TOKENS, CudaGraphs, Run
from post_shared.method.transfer.transfer import transfer
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import copy_student
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.schemas.transfers import TransferOptions
from post_shared.schemas.tuning import TuneOptions
from tests.models import LABELS, MASKED, TEXTS, tiny_model

TASK = Task("{text}, it was", {"negative": ("bad", "terrible"), "positive": ("good", "great")})


class Tape:
    """What all passes of a graphs write to, as CUDA graphs write to their pool."""

    def __init__(self) -> None:
        self.last: TapePass | None = None
        self.made: list[TapePass] = []
        self.replayed = 0

    def __call__(self, run: Run, prompt: Tensor, others: Sequence[Tensor], pool: Any) -> TapePass:
        self.made.append(TapePass(self, run, prompt, others))
        return self.made[-1]


class TapePass:
    """A pass that keeps what it keeps where the next one writes."""

    def __init__(self, tape: Tape, run: Run, prompt: Tensor, others: Sequence[Tensor]) -> None:
        self.tape, self.run, self.shapes = tape, run, [each.shape for each in (prompt, *others)]

    def forward(self, prompt: Tensor, others: Sequence[Tensor]) -> Tensor:
        assert [each.shape for each in (prompt, *others)] == self.shapes
        self.tape.last, self.tape.replayed = self, self.tape.replayed + 1
        self.prompt = prompt.detach().clone().requires_grad_()
        with torch.enable_grad():
            self.hidden = self.run(self.prompt, *others)
        return self.hidden.detach().clone()

    def backward(self, gradient: Tensor) -> Tensor:
        assert self.tape.last is self, "another pass was run in between"
        self.tape.last = None
        return torch.autograd.grad(self.hidden, self.prompt, gradient)[0]


def encoded(model: LanguageModel) -> EncodedRows:
    return encode_rows(model, TASK, TEXTS)


def found(model: LanguageModel, index: Sequence[int]) -> tuple[Tensor, Tensor]:
    leaf = SoftPrompt.random(model, 5).embeddings.clone().requires_grad_()
    logits = model.answer_logits(encoded(model).batch(index), leaf)
    logits.logsumexp(-1).sum().backward()
    assert leaf.grad is not None
    return logits.detach(), leaf.grad


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox", "opt"])
def test_a_replayed_pass_is_the_pass(family: str) -> None:
    model, tape = tiny_model(family), Tape()
    some = [[0, 1, 2], [3, 4, 5], [5, 4, 3], [0, 2, 1], [1, 2, 0]]
    expected = [found(model, index) for index in some]
    with model.replaying(CudaGraphs(tape)):
        replayed = [found(model, index) for index in some]
    assert 0 < len(tape.made) < tape.replayed < len(some) + 1  # the first of a shape isn't
    for mine, plain in zip(replayed, expected, strict=True):
        torch.testing.assert_close(mine, plain)
    assert all(each.shapes[1][1] % TOKENS == 0 for each in tape.made)


def test_padding_ends_where_the_models_positions_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tape = tiny_model(), Tape()
    expected = found(model, [3, 4])
    longest = encoded(model).batch([3, 4]).longest
    assert longest % TOKENS
    monkeypatch.setitem(vars(model), "packs", 5 + longest)
    with model.replaying(CudaGraphs(tape)):
        for _ in range(2):
            torch.testing.assert_close(found(model, [3, 4]), expected)
    (made,) = tape.made
    assert made.shapes[1] == (2, longest)


def test_as_many_tokens_in_other_rows_are_another_pass() -> None:
    model, tape = tiny_model(), Tape()
    short, long = [0, 2, 5, 6], [3, 4]  # four rows of 16 tokens, two of 32
    expected = [found(model, index) for index in (short, long)]
    with model.replaying(CudaGraphs(tape)):
        for _ in range(2):
            for index, plain in zip((short, long), expected, strict=True):
                torch.testing.assert_close(found(model, index), plain)
    assert [each.shapes[1] for each in tape.made] == [(4, 16), (2, 32)]


def test_while_the_way_back_is_to_come_passes_run_as_they_are() -> None:
    model, tape = tiny_model(), Tape()
    leaf = SoftPrompt.random(model, 5).embeddings.requires_grad_()
    batch = encoded(model).batch([0, 1])

    def gradient(twice: bool) -> Tensor:
        one = model.answer_logits(batch, leaf).sum()
        other = model.answer_logits(batch, 2 * leaf).sum() if twice else torch.zeros(())
        with torch.no_grad():
            model.answer_logits(batch, 3 * leaf)
        (made,) = torch.autograd.grad(one + other, leaf)
        return made

    expected = gradient(True), gradient(False)
    with model.replaying(CudaGraphs(tape)):
        gradient(False)
        assert not tape.made, "a look without gradients is no meeting"
        torch.testing.assert_close(gradient(True), expected[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(gradient(False), expected[1], rtol=1e-3, atol=1e-3)
        assert tape.replayed == 2
        with torch.no_grad():
            model.answer_logits(batch, leaf)
        assert tape.replayed == 3
        model.answer_logits(batch, leaf)  # nobody will go back through it
        torch.testing.assert_close(gradient(False), expected[1], rtol=1e-3, atol=1e-3)
    assert tape.replayed == 5


def test_a_replayed_pass_is_gone_back_through_once() -> None:
    model = tiny_model()
    leaf = SoftPrompt.random(model, 5).embeddings.requires_grad_()
    batch = encoded(model).batch([0, 1])
    with model.replaying(CudaGraphs(Tape())):
        model.answer_logits(batch, leaf)
        summed = model.answer_logits(batch, leaf).sum()
        torch.autograd.grad(summed, leaf, retain_graph=True)
        with pytest.raises(RuntimeError, match="once"):
            torch.autograd.grad(summed, leaf)


def test_only_so_many_shapes_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("post_shared.engine.cuda_graphs.MAX_GRAPHS", 1)
    model, tape = tiny_model(), Tape()
    with model.replaying(CudaGraphs(tape)):
        for index in ([0], [0], [0, 1], [0, 1], [0]):
            found(model, index)
    assert [each.shapes[1][0] for each in tape.made] == [1]
    assert tape.replayed == 2


def test_what_is_recorded_gives_way_where_memory_ends(caplog: pytest.LogCaptureFixture) -> None:
    graphs, calls = CudaGraphs(Tape()), []

    def run(prompt: Tensor, ids: Tensor) -> Tensor:
        calls.append(len(ids))
        if len(ids) == 2 and graphs.made:
            raise torch.OutOfMemoryError("no memory")
        return prompt * len(ids)

    def full(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory at all")

    prompt = torch.ones(1, requires_grad=True)
    with caplog.at_level(logging.WARNING, "post.cuda_graphs"):
        for rows in (1, 1, 2, 1):
            assert graphs(run, prompt, torch.zeros(rows, 1)).tolist() == [rows]
    assert calls == [1, 1, 2, 2, 1]
    assert "no memory" in caplog.text
    with pytest.raises(torch.OutOfMemoryError, match="at all"):
        graphs(full, prompt, torch.zeros(3, 1))


def test_what_cannot_be_recorded_is_run(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: Any) -> TapePass:
        raise RuntimeError("operation not permitted when stream is capturing")

    model = tiny_model()
    expected = found(model, [0, 1])
    with caplog.at_level(logging.WARNING, "post.cuda_graphs"), model.replaying(CudaGraphs(refuse)):
        for _ in range(3):
            torch.testing.assert_close(found(model, [0, 1]), expected)
    assert [record.message for record in caplog.records] == [
        "passes aren't recorded, which costs time: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("family", ["bloom", "gemma2", *MASKED])
def test_families_that_look_at_their_masks_run_as_they_are(family: str) -> None:
    model, tape = tiny_model(family), Tape()
    task = TASK if family not in MASKED else Task("{text}, it was {mask}", TASK.label_words)
    batch = encode_rows(model, task, TEXTS).batch([0, 1])
    with model.replaying(CudaGraphs(tape)), torch.no_grad():
        for _ in range(3):
            model.answer_logits(batch, SoftPrompt.random(model, 5).embeddings)
    assert not tape.made


def test_what_else_runs_runs_as_it_is() -> None:
    model, other, tape = tiny_model(), tiny_model(seed=1), Tape()
    batch = encoded(model).batch([0, 1])
    prompt = SoftPrompt.random(model, 5).embeddings
    with model.replaying(CudaGraphs(tape)), torch.no_grad():
        for _ in range(3):
            other.answer_logits(batch, prompt)
            model.answer_logits(batch, prompt.expand(2, -1, -1))
            model.answer_logits(batch, torch.stack([prompt, prompt]), prompt_index=torch.tensor([1, 0]))
        assert not tape.made
        with model.replaying(None):
            model.answer_logits(batch, prompt)
        assert not tape.made
    assert model.new_graphs() is None  # no GPU holds it


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Those of all recorders that are made."""
    every: list[Tape] = []

    def make(_: LanguageModel) -> CudaGraphs:
        every.append(Tape())
        return CudaGraphs(every[-1])

    monkeypatch.setattr(LanguageModel, "new_graphs", make)
    return every


def same(work: Callable[[], SoftPrompt], tapes: list[Tape]) -> None:
    replayed = work()
    assert tapes
    assert all(tape.replayed for tape in tapes)
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(LanguageModel, "new_graphs", lambda _: None)
        expected = work()
    torch.testing.assert_close(replayed.embeddings, expected.embeddings, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("texts", [1, 24], ids=["no lean", "lean"])
def test_tuning(texts: int, tapes: list[Tape]) -> None:
    rows = [
        Row(f"{text} {number}" if texts > 1 else text, label)
        for number in range(texts)
        for text, label in zip(TEXTS, LABELS, strict=True)
    ]
    config = TuneOptions(num_virtual_tokens=4, steps=12, batch_size=8)
    model = tiny_model()
    same(lambda: tune(model, TASK, rows, config, privacy=None).prompt, tapes)
    assert len(tapes) == (2 if texts > 1 else 1)


@pytest.mark.parametrize("method", ["ensemble", "paper"])
def test_a_transfer(method: str, tapes: list[Tape]) -> None:
    target = tiny_model()
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4)
    texts = [f"{text} {number}" for number in range(10) for text in TEXTS]
    config = TransferOptions(steps=12, batch_size=5, method=method, learning_rate=0.003)  # type: ignore[arg-type]
    same(lambda: transfer(target, student, TASK, prompt, texts, config).prompt, tapes)
