"""Long measurements in pieces, so that they can be watched and stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput
from post_shared.inference.classification import ServedPrompt
from post_shared.inference.evaluation import classify, exact_match, generate, score
from post_shared.model.language_model import LanguageModel
from post_shared.training.progress import Progress, ProgressCallback

PIECE = 64


def guess_labels(
    model: LanguageModel,
    task: Task,
    texts: Sequence[str],
    prompt: Tensor | None,
    on_progress: ProgressCallback,
    *,
    max_length: int = 128,
) -> list[int]:
    """Which of the task's labels the model holds likeliest for each text."""
    ready = ServedPrompt.of(model, task, prompt)
    guesses: list[int] = []
    for at in range(0, len(texts), PIECE):
        scores = classify(model, task, texts[at : at + PIECE], ready, max_length=max_length)
        guesses += scores.argmax(-1).tolist()
        on_progress(Progress(len(guesses), len(texts), "evaluate"))
    return guesses


def measure(
    model: LanguageModel, task: Task, rows: Sequence[Row], prompt: Tensor | None, on_progress: ProgressCallback
) -> dict[str, Any]:
    """As :func:`post_shared.inference.evaluation.evaluate`, in pieces, so that it can be watched and stopped.

    Raises:
        InvalidInput: a row without a label, or labels that aren't the task's.
    """
    if any(row.label is None for row in rows):
        raise InvalidInput("an evaluation needs labelled rows; this dataset has rows without a label")
    labels = [str(row.label) for row in rows]
    unknown = sorted(set(labels) - set(task.labels))
    if unknown and not task.is_generation:
        raise InvalidInput(f"the dataset has labels that the task doesn't know: {', '.join(unknown[:10])}")
    texts = [row.text for row in rows]
    if not task.is_generation:
        guesses = guess_labels(model, task, texts, prompt, on_progress)
        return asdict(score(task, guesses, labels))
    answers: list[str] = []
    for at in range(0, len(texts), PIECE):
        answers += generate(model, task, texts[at : at + PIECE], prompt)
        on_progress(Progress(len(answers), len(texts), "evaluate"))
    return {"accuracy": exact_match(answers, labels), "rows": len(rows), "recall": {}}
