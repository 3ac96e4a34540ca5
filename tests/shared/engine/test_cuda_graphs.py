"""Replayed passes give the results of eager ones. ``tests/test_cuda.py`` tests real CUDA graphs."""

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
    """Stands for the pool that all passes of a model share: only the last one's memory is valid."""

    def __init__(self) -> None:
        self.last: TapePass | None = None
        self.captured: list[TapePass] = []
        self.replayed = 0

    def __call__(self, run: Run, prompt: Tensor, others: Sequence[Tensor], pool: Any) -> TapePass:
        self.captured.append(TapePass(self, run, prompt, others))
        return self.captured[-1]


class TapePass:
    """A captured pass whose saved tensors are overwritten by the next one."""

    def __init__(self, tape: Tape, run: Run, prompt: Tensor, others: Sequence[Tensor]) -> None:
        self.tape, self.run, self.shapes = tape, run, [tensor.shape for tensor in (prompt, *others)]

    def forward(self, prompt: Tensor, others: Sequence[Tensor]) -> Tensor:
        assert [tensor.shape for tensor in (prompt, *others)] == self.shapes
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


def logits_and_gradient(model: LanguageModel, index: Sequence[int]) -> tuple[Tensor, Tensor]:
    leaf = SoftPrompt.random(model, 5).embeddings.clone().requires_grad_()
    logits = model.answer_logits(encoded(model).batch(index), leaf)
    logits.logsumexp(-1).sum().backward()
    assert leaf.grad is not None
    return logits.detach(), leaf.grad


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox", "opt"])
def test_a_replayed_pass_is_the_pass(family: str) -> None:
    model, tape = tiny_model(family), Tape()
    batches = [[0, 1, 2], [3, 4, 5], [5, 4, 3], [0, 2, 1], [1, 2, 0]]
    expected = [logits_and_gradient(model, index) for index in batches]
    with model.using_graphs(CudaGraphs(tape)):
        replayed = [logits_and_gradient(model, index) for index in batches]
    assert 0 < len(tape.captured) < tape.replayed < len(batches) + 1  # the first pass of a shape is eager
    for actual, plain in zip(replayed, expected, strict=True):
        torch.testing.assert_close(actual, plain)
    assert all(captured.shapes[1][1] % TOKENS == 0 for captured in tape.captured)


def test_padding_ends_where_the_models_positions_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tape = tiny_model(), Tape()
    expected = logits_and_gradient(model, [3, 4])
    longest = encoded(model).batch([3, 4]).longest
    assert longest % TOKENS
    monkeypatch.setitem(vars(model), "packs", 5 + longest)
    with model.using_graphs(CudaGraphs(tape)):
        for _ in range(2):
            torch.testing.assert_close(logits_and_gradient(model, [3, 4]), expected)
    (captured,) = tape.captured
    assert captured.shapes[1] == (2, longest)


def test_the_same_number_of_tokens_in_other_rows_is_another_pass() -> None:
    model, tape = tiny_model(), Tape()
    short, long = [0, 2, 5, 6], [3, 4]  # four rows of 16 tokens, two of 32
    expected = [logits_and_gradient(model, index) for index in (short, long)]
    with model.using_graphs(CudaGraphs(tape)):
        for _ in range(2):
            for index, plain in zip((short, long), expected, strict=True):
                torch.testing.assert_close(logits_and_gradient(model, index), plain)
    assert [captured.shapes[1] for captured in tape.captured] == [(4, 16), (2, 32)]


def test_while_a_backward_pass_is_pending_other_passes_are_eager() -> None:
    model, tape = tiny_model(), Tape()
    leaf = SoftPrompt.random(model, 5).embeddings.requires_grad_()
    batch = encoded(model).batch([0, 1])

    def gradient(twice: bool) -> Tensor:
        one = model.answer_logits(batch, leaf).sum()
        other = model.answer_logits(batch, 2 * leaf).sum() if twice else torch.zeros(())
        with torch.no_grad():
            model.answer_logits(batch, 3 * leaf)
        return torch.autograd.grad(one + other, leaf)[0]

    expected = gradient(True), gradient(False)
    with model.using_graphs(CudaGraphs(tape)):
        gradient(False)
        assert not tape.captured, "a pass without gradients doesn't count towards capturing a shape"
        torch.testing.assert_close(gradient(True), expected[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(gradient(False), expected[1], rtol=1e-3, atol=1e-3)
        assert tape.replayed == 2
        with torch.no_grad():
            model.answer_logits(batch, leaf)
        assert tape.replayed == 3
        model.answer_logits(batch, leaf)  # its backward pass never runs
        torch.testing.assert_close(gradient(False), expected[1], rtol=1e-3, atol=1e-3)
    assert tape.replayed == 5


def test_a_replayed_pass_has_one_backward_pass() -> None:
    model = tiny_model()
    leaf = SoftPrompt.random(model, 5).embeddings.requires_grad_()
    batch = encoded(model).batch([0, 1])
    with model.using_graphs(CudaGraphs(Tape())):
        model.answer_logits(batch, leaf)
        summed = model.answer_logits(batch, leaf).sum()
        torch.autograd.grad(summed, leaf, retain_graph=True)
        with pytest.raises(RuntimeError, match="one backward pass"):
            torch.autograd.grad(summed, leaf)


def test_the_number_of_captured_shapes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("post_shared.engine.cuda_graphs.MAX_GRAPHS", 1)
    model, tape = tiny_model(), Tape()
    with model.using_graphs(CudaGraphs(tape)):
        for index in ([0], [0], [0, 1], [0, 1], [0]):
            logits_and_gradient(model, index)
    assert [captured.shapes[1][0] for captured in tape.captured] == [1]
    assert tape.replayed == 2


def test_captured_passes_are_freed_when_memory_runs_out(caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_pass_that_cannot_be_captured_is_eager(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: Any) -> TapePass:
        raise RuntimeError("operation not permitted when stream is capturing")

    model = tiny_model()
    expected = logits_and_gradient(model, [0, 1])
    with caplog.at_level(logging.WARNING, "post.cuda_graphs"), model.using_graphs(CudaGraphs(refuse)):
        for _ in range(3):
            torch.testing.assert_close(logits_and_gradient(model, [0, 1]), expected)
    assert [record.message for record in caplog.records] == [
        "passes aren't recorded, which costs time: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("family", ["bloom", "gemma2", *MASKED])
def test_families_that_inspect_their_masks_are_eager(family: str) -> None:
    model, tape = tiny_model(family), Tape()
    task = TASK if family not in MASKED else Task("{text}, it was {mask}", TASK.label_words)
    batch = encode_rows(model, task, TEXTS).batch([0, 1])
    with model.using_graphs(CudaGraphs(tape)), torch.no_grad():
        for _ in range(3):
            model.answer_logits(batch, SoftPrompt.random(model, 5).embeddings)
    assert not tape.captured


def test_all_other_passes_are_eager() -> None:
    model, other, tape = tiny_model(), tiny_model(seed=1), Tape()
    batch = encoded(model).batch([0, 1])
    prompt = SoftPrompt.random(model, 5).embeddings
    with model.using_graphs(CudaGraphs(tape)), torch.no_grad():
        for _ in range(3):
            other.answer_logits(batch, prompt)
            model.answer_logits(batch, prompt.expand(2, -1, -1))
            model.answer_logits(batch, torch.stack([prompt, prompt]), prompt_index=torch.tensor([1, 0]))
        assert not tape.captured
        with model.using_graphs(None):
            model.answer_logits(batch, prompt)
        assert not tape.captured
    assert model.new_graphs() is None  # the model isn't on a GPU


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The tapes of all graphs that are created."""
    created: list[Tape] = []

    def new_graphs(_: LanguageModel) -> CudaGraphs:
        created.append(Tape())
        return CudaGraphs(created[-1])

    monkeypatch.setattr(LanguageModel, "new_graphs", new_graphs)
    return created


def check_same(run: Callable[[], SoftPrompt], tapes: list[Tape]) -> None:
    replayed = run()
    assert tapes
    assert all(tape.replayed for tape in tapes)
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(LanguageModel, "new_graphs", lambda _: None)
        expected = run()
    torch.testing.assert_close(replayed.embeddings, expected.embeddings, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("texts", [1, 24], ids=["no bias", "bias"])
def test_tuning(texts: int, tapes: list[Tape]) -> None:
    rows = [
        Row(f"{text} {number}" if texts > 1 else text, label)
        for number in range(texts)
        for text, label in zip(TEXTS, LABELS, strict=True)
    ]
    config = TuneOptions(num_virtual_tokens=4, steps=12, batch_size=8)
    model = tiny_model()
    check_same(lambda: tune(model, TASK, rows, config, privacy=None).prompt, tapes)
    assert len(tapes) == (2 if texts > 1 else 1)


@pytest.mark.parametrize("method", ["ensemble", "paper"])
def test_a_transfer(method: str, tapes: list[Tape]) -> None:
    target = tiny_model()
    student, prompt = copy_student(target, [0, 3]), SoftPrompt.random(target, 4)
    texts = [f"{text} {number}" for number in range(10) for text in TEXTS]
    config = TransferOptions(steps=12, batch_size=5, method=method, learning_rate=0.003)  # type: ignore[arg-type]
    check_same(lambda: transfer(target, student, TASK, prompt, texts, config).prompt, tapes)
