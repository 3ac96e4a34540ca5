"""The constants of a transfer, computed once: Φs(p_s + x), Φs(x) and Φt(x) at the answer positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from post_shared.data.batches import Batch, EncodedRows
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import LabelWords
from post_shared.training.progress import Progress, ProgressCallback, ignore

BATCH_LIMITS: dict[str, tuple[int, int | None]] = {"cpu": (32, None), "cuda": (128, 8192)}
"""(texts, tokens) of a batch at most, by device type. A smaller batch doesn't fill a GPU."""


@dataclass(frozen=True)
class TeacherOutputs:
    """The constant outputs, a row for each text's answer positions: logits (N, V) or class scores (N, C)."""

    student: Tensor
    """Φs(p_s + x)"""
    student_plain: Tensor
    """Φs(x); empty with class scores"""
    target_plain: Tensor
    """Φt(x)"""
    texts: Batch
    """All texts, in order."""

    def rows_of(self, batch: Batch) -> Tensor:
        """Indices of the batch's answer positions in the tensors above: (P,)."""
        return self.texts.answers_at(batch.index)


def teacher_outputs(
    target: LanguageModel,
    student: LanguageModel,
    prompt: SoftPrompt,
    encoded: EncodedRows,
    words: LabelWords | None = None,
) -> TeacherOutputs:
    """The three constant forward passes over all rows; with ``words``, only class scores are kept."""
    from_student = student_outputs(student, prompt, encoded, words)
    return TeacherOutputs(*from_student, model_outputs(target, encoded, words), encoded.whole)


def student_outputs(
    student: LanguageModel,
    prompt: SoftPrompt,
    encoded: EncodedRows,
    words: LabelWords | None,
    *,
    on_progress: ProgressCallback = ignore,
) -> tuple[Tensor, Tensor]:
    """Φs(p_s + x) and Φs(x). Only Eq. 5 needs the latter: with class scores it is empty."""
    passes = 1 if words else 2
    first, second = (progress_of_pass(on_progress, index, passes, "student") for index in range(2))
    prompted = model_outputs(student, encoded, words, prompt, on_progress=first)
    plain = None if words else model_outputs(student, encoded, words, on_progress=second)
    return prompted, torch.empty(0) if plain is None else plain


def progress_of_pass(
    on_progress: ProgressCallback, index: int, passes: int, stage: str = "precompute"
) -> ProgressCallback:
    """The progress callback of pass ``index``, one of ``passes`` equal passes that together are one stage."""
    return lambda own: on_progress(Progress(index * own.steps + own.step, passes * own.steps, stage))


@torch.no_grad()
def model_outputs(
    model: LanguageModel,
    encoded: EncodedRows,
    words: LabelWords | None,
    prompt: SoftPrompt | None = None,
    *,
    on_progress: ProgressCallback = ignore,
) -> Tensor:
    """The model's outputs at every answer position: logits (N, V) or, with ``words``, class scores (N, C)."""
    texts = encoded.whole
    outputs = torch.empty(len(texts.rows), len(words.weights) if words else model.vocabulary)
    tokens = words.token_ids if words else None
    size, max_tokens = BATCH_LIMITS.get(model.device.type, BATCH_LIMITS["cpu"])
    batches = texts.split(size, tokens=max_tokens, reserved=prompt.length if prompt else 0)
    for step, batch in enumerate(batches, 1):
        rows = texts.answers_at(batch.index)
        logits = model.answer_logits(batch, prompt.embeddings if prompt else None, tokens=tokens)
        outputs[rows] = (words.scores(logits) if words else logits).cpu()
        on_progress(Progress(step, len(batches), "precompute"))
    return outputs
