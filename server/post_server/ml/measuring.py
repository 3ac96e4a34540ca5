"""Long measurements in pieces, so that they can be watched and stopped."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from post_shared.evaluation import classify
from post_shared.language_model import LanguageModel
from post_shared.tasks import Task
from post_shared.training import Progress, Reporter

PIECE = 64


def guess_labels(
    model: LanguageModel,
    task: Task,
    texts: Sequence[str],
    prompt: Tensor | None,
    report: Reporter,
    *,
    max_length: int = 128,
) -> list[int]:
    """Which of the task's labels the model holds likeliest for each text."""
    kept = model.prefix(prompt) if prompt is not None and model.kind == "causal" else prompt
    guesses: list[int] = []
    for at in range(0, len(texts), PIECE):
        scores = classify(model, task, texts[at : at + PIECE], kept, max_length=max_length)
        guesses += scores.argmax(-1).tolist()
        report(Progress(len(guesses), len(texts), "evaluate"))
    return guesses
