"""Evaluation of a model on a task, with or without a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import DataInvalid, InvalidInput
from post_shared.inference.classification import ServedPrompt, classify_mixed
from post_shared.inference.generation import continuations
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.memory_plan import plan_pass
from post_shared.training.progress import Progress, ProgressCallback

CHUNK = 64
"""Texts between two calls of a progress callback."""


@dataclass(frozen=True)
class Evaluation:
    """``accuracy`` is the share of correct answers (exact match for generation); ``recall`` is per label."""

    accuracy: float
    rows: int
    recall: dict[str, float] = field(default_factory=dict)


def classify(
    model: LanguageModel,
    task: Task,
    texts: Sequence[str],
    prompt: Tensor | ServedPrompt | None = None,
    *,
    max_length: int = 128,
) -> Tensor:
    """Class probabilities (N, C), in the order of ``texts`` and of ``task.labels``, computed as in serving.

    ``prompt`` is (l, d) or, cheaper for several calls, a :class:`ServedPrompt`.

    Raises:
        InvalidInput: the model's outputs are NaN or infinite.
    """
    served = prompt if isinstance(prompt, ServedPrompt) else ServedPrompt.of(model, task, prompt)
    scores = [result.scores for result in classify_mixed(model, texts, [served] * len(texts), max_length=max_length)]
    if None in scores:
        raise InvalidInput("the model's outputs are NaN or infinite; if the prompt has huge values, tune it again")
    return torch.tensor(scores).reshape(len(texts), len(task.labels))


def generate(
    model: LanguageModel,
    task: Task,
    texts: Sequence[str],
    prompt: Tensor | None = None,
    *,
    batch_size: int = 16,
    max_length: int = 128,
    max_new_tokens: int = 16,
) -> list[str]:
    """Greedy answers of a generation task, in the order of ``texts``.

    Raises:
        InvalidInput: the model can't generate.
        OutOfMemory: not even one text at a time fits the free memory.
    """
    prefix = None if prompt is None else model.prefix(prompt)
    reserved = max_new_tokens + (0 if prefix is None else prefix.length)
    encoded = encode_rows(model, task, texts, max_length, reserved=reserved)
    answers = [""] * len(texts)
    longest = max_length + reserved
    cached = 2 * model.prefix(torch.zeros(1, model.hidden_size)).nbytes  # keys and values per position; growing copies
    fits = plan_pass(model, longest=longest, kept=cached).positions // longest
    for batch in encoded.in_order_of_length(min(batch_size, fits)):
        generated = continuations(model, [encoded.rows[i].token_ids for i in batch.index], prefix, max_new_tokens)
        for i, answer in zip(batch.index, generated, strict=True):
            answers[i] = answer
    return answers


def evaluate(
    model: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    prompt: Tensor | None = None,
    *,
    max_length: int = 128,
    on_progress: ProgressCallback | None = None,
) -> Evaluation:
    """Accuracy over labelled rows; for a generation task, exact match up to case and outer whitespace.

    With ``on_progress``, texts run in chunks, so that the evaluation can be followed and cancelled.

    Raises:
        DataInvalid: no rows, a row without a label, or a label that the task doesn't have.
        InvalidInput: the model's outputs are NaN or infinite.
        Cancelled: raised by ``on_progress``.
    """
    texts, labels = [row.text for row in rows], [row.label for row in rows]
    if not rows or None in labels:
        raise DataInvalid("an evaluation needs at least one row, and a label for each")
    if task.is_generation:
        answers: list[str] = []
        for chunk in _chunks(texts, on_progress):
            answers += generate(model, task, chunk, prompt, max_length=max_length)
            _report(on_progress, len(answers), len(texts))
        return Evaluation(exact_match(answers, [str(label) for label in labels]), len(rows))
    check_labels(task, rows)
    predicted = guess_labels(model, task, texts, prompt, on_progress, max_length=max_length)
    return score(task, predicted, [str(label) for label in labels])


def guess_labels(
    model: LanguageModel,
    task: Task,
    texts: Sequence[str],
    prompt: Tensor | None = None,
    on_progress: ProgressCallback | None = None,
    *,
    max_length: int = 128,
) -> list[int]:
    """Index of the most likely label of each text. ``on_progress`` as in :func:`evaluate`.

    Raises:
        InvalidInput: the model's outputs are NaN or infinite.
    """
    served = ServedPrompt.of(model, task, prompt)
    predicted: list[int] = []
    for chunk in _chunks(texts, on_progress):
        predicted += classify(model, task, chunk, served, max_length=max_length).argmax(-1).tolist()
        _report(on_progress, len(predicted), len(texts))
    return predicted


def _chunks(texts: Sequence[str], on_progress: ProgressCallback | None) -> Iterator[Sequence[str]]:
    """Chunks of :data:`CHUNK` texts; all at once without ``on_progress``: larger batches have less padding."""
    size = max(1, len(texts)) if on_progress is None else CHUNK
    return (texts[start : start + size] for start in range(0, len(texts), size))


def _report(on_progress: ProgressCallback | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(Progress(done, total, "evaluate"))


def score(task: Task, predicted: Sequence[int], labels: Sequence[str]) -> Evaluation:
    """Accuracy and recall of predicted label indices against label names."""
    correct = correct_rows(task, predicted, labels)
    recall = {}
    for name in task.labels:
        hits = [hit for hit, label in zip(correct, labels, strict=True) if label == name]
        if hits:
            recall[name] = sum(hits) / len(hits)
    return Evaluation(sum(correct) / len(correct), len(correct), recall)


def correct_rows(task: Task, predicted: Sequence[int], labels: Sequence[str | None]) -> list[bool]:
    """Which predicted label indices are those of the label names."""
    return [task.labels[guess] == label for guess, label in zip(predicted, labels, strict=True)]


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that equal the expected ones, up to case and outer whitespace."""
    same = [a.strip().casefold() == e.strip().casefold() for a, e in zip(answers, expected, strict=True)]
    return sum(same) / len(same)


def check_labels(task: Task, rows: Sequence[Row]) -> None:
    """Raise :class:`DataInvalid` if a label of ``rows`` isn't one of the task's."""
    unknown = sorted({str(row.label) for row in rows} - set(task.labels))
    if unknown:
        raise DataInvalid(
            f"the data has labels that the task doesn't have: {', '.join(unknown[:10])}; "
            f"the task's labels are: {', '.join(task.labels)}"
        )
