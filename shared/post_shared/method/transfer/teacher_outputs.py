"""What never changes while a prompt is transferred, computed once: Φs(p_s + x), Φs(x) and Φt(x), where texts end."""

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
"""Texts that are answered, and tokens in all that they may have, by where the model is: a GPU is filled by no less."""


@dataclass(frozen=True)
class TeacherOutputs:
    """What never changes during a transfer, one row per text and answer position: logits (N, V) or scores (N, C)."""

    student: Tensor
    """Φs(p_s + x)"""
    student_plain: Tensor
    """Φs(x); left empty with class scores"""
    target_plain: Tensor
    """Φt(x)"""
    texts: Batch
    """All of them, in their order."""

    def of(self, batch: Batch) -> Tensor:
        """The positions of a batch's rows in the tensors above: (P,)."""
        return self.texts.answers_at(batch.index)


def teacher_outputs(
    target: LanguageModel,
    student: LanguageModel,
    prompt: SoftPrompt,
    encoded: EncodedRows,
    words: LabelWords | None = None,
) -> TeacherOutputs:
    """Run each of the three constant forward passes once over all rows; with ``words``, keep class scores only."""
    said = student_outputs(student, prompt, encoded, words)
    return TeacherOutputs(*said, model_outputs(target, encoded, words), encoded.whole)


def student_outputs(
    student: LanguageModel,
    prompt: SoftPrompt,
    encoded: EncodedRows,
    words: LabelWords | None,
    *,
    on_progress: ProgressCallback = ignore,
) -> tuple[Tensor, Tensor]:
    """Φs(p_s + x) and Φs(x); the latter, which only Eq. 5 looks at, is left empty with class scores."""
    passes = 1 if words else 2
    prompted = model_outputs(student, encoded, words, prompt, on_progress=in_turn(on_progress, 0, passes, "student"))
    plain = (
        None
        if words
        else model_outputs(student, encoded, words, on_progress=in_turn(on_progress, 1, passes, "student"))
    )
    return prompted, torch.empty(0) if plain is None else plain


def in_turn(on_progress: ProgressCallback, at: int, passes: int, stage: str = "precompute") -> ProgressCallback:
    """For pass number ``at`` of so many alike, which together are one stage."""
    return lambda each: on_progress(Progress(at * each.steps + each.step, passes * each.steps, stage))


@torch.no_grad()
def model_outputs(
    model: LanguageModel,
    encoded: EncodedRows,
    words: LabelWords | None,
    prompt: SoftPrompt | None = None,
    *,
    on_progress: ProgressCallback = ignore,
) -> Tensor:
    """What the model says at every answer position: logits (N, V) or, with ``words``, class scores (N, C)."""
    texts = encoded.whole
    found = torch.empty(len(texts.rows), len(words.weights) if words else model.vocabulary)
    tokens = words.token_ids if words else None
    size, most = BATCH_LIMITS.get(model.device.type, BATCH_LIMITS["cpu"])
    batches = texts.split(size, tokens=most, reserved=prompt.length if prompt else 0)
    for step, batch in enumerate(batches, 1):
        at = texts.answers_at(batch.index)
        logits = model.answer_logits(batch, prompt.embeddings if prompt else None, tokens=tokens)
        found[at] = (words.scores(logits) if words else logits).cpu()
        on_progress(Progress(step, len(batches), "precompute"))
    return found
