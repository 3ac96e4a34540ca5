"""What a model makes of a task, with or without a prompt."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Evaluation:
    """``accuracy`` is the share of right answers (exact match for generation); ``recall`` that of each label."""

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
    """Class probabilities (N, C), in the order of ``texts`` and of ``task.labels``, as they are served.

    ``prompt`` is (l, d) or, cheaper in several calls, what was made ready of it.

    Raises:
        InvalidInput: the model's answers to this prompt are no numbers.
    """
    ready = prompt if isinstance(prompt, ServedPrompt) else ServedPrompt.of(model, task, prompt)
    scores = [each.scores for each in classify_mixed(model, texts, [ready] * len(texts), max_length=max_length)]
    if None in scores:
        raise InvalidInput("the model's answers are no numbers; with a prompt of far too large ones, tune it again")
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
    """Free answers of a generation task, greedy, in the order of ``texts``.

    Raises:
        InvalidInput: the model can't generate.
        OutOfMemory: not even one text at a time fits the free memory.
    """
    prefix = None if prompt is None else model.prefix(prompt)
    reserved = max_new_tokens + (0 if prefix is None else prefix.length)
    encoded = encode_rows(model, task, texts, max_length, reserved=reserved)
    answers = [""] * len(texts)
    each = max_length + reserved
    cached = 2 * model.prefix(torch.zeros(1, model.hidden_size)).nbytes  # a position's keys and values, as they grow
    fits = plan_pass(model, longest=each, kept=cached).positions // each
    for batch in encoded.in_order_of_length(min(batch_size, fits)):
        made = continuations(model, [encoded.rows[at].token_ids for at in batch.index], prefix, max_new_tokens)
        for at, answer in zip(batch.index, made, strict=True):
            answers[at] = answer
    return answers


def evaluate(
    model: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    prompt: Tensor | None = None,
    *,
    max_length: int = 128,
) -> Evaluation:
    """Accuracy over labelled rows; exact match (case and outer space aside) for a generation task.

    Raises:
        DataInvalid: a row without a label, or none at all.
        TaskInvalid: a label that the task doesn't know.
    """
    texts, labels = [row.text for row in rows], [row.label for row in rows]
    if not rows or None in labels:
        raise DataInvalid("an evaluation needs labelled rows, at least one")
    if task.is_generation:
        answers = generate(model, task, texts, prompt, max_length=max_length)
        return Evaluation(exact_match(answers, [str(label) for label in labels]), len(rows))
    check_labels(task, rows)
    scores = classify(model, task, texts, prompt, max_length=max_length)
    return score(task, scores.argmax(-1).tolist(), [str(label) for label in labels])


def score(task: Task, predicted: Sequence[int], labels: Sequence[str]) -> Evaluation:
    """Accuracy and recall of predicted label indices against label names."""
    right = [task.labels[guess] == label for guess, label in zip(predicted, labels, strict=True)]
    recall = {}
    for name in task.labels:
        hits = [hit for hit, label in zip(right, labels, strict=True) if label == name]
        if hits:
            recall[name] = sum(hits) / len(hits)
    return Evaluation(sum(right) / len(right), len(right), recall)


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that equal what was expected, case and outer space aside."""
    same = [a.strip().casefold() == e.strip().casefold() for a, e in zip(answers, expected, strict=True)]
    return sum(same) / len(same)


def check_labels(task: Task, rows: Sequence[Row]) -> None:
    """Raise :class:`DataInvalid` when a label of ``rows`` isn't the task's."""
    unknown = sorted({str(row.label) for row in rows} - set(task.labels))
    if unknown:
        raise DataInvalid(
            f"the data has labels that the task doesn't know: {', '.join(unknown[:10])}; "
            f"the task's labels are: {', '.join(task.labels)}"
        )
