"""What never changes while a prompt is transferred, computed once: Φs(p_s + x), Φs(x) and Φt(x), where texts end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from post_shared.batches import Batch, EncodedRows
from post_shared.label_words import LabelWords
from post_shared.language_model import LanguageModel
from post_shared.soft_prompt import SoftPrompt
from post_shared.training import Progress, Reporter, ignore

AT_A_TIME: dict[str, tuple[int, int | None]] = {"cpu": (32, None), "cuda": (128, 8192)}
"""Texts that are answered, and tokens in all that they may have, by where the model is: a GPU is filled by no less."""


@dataclass(frozen=True)
class Constants:
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


def constants(
    target: LanguageModel,
    student: LanguageModel,
    prompt: SoftPrompt,
    encoded: EncodedRows,
    words: LabelWords | None = None,
) -> Constants:
    """Run each of the three constant forward passes once over all rows; with ``words``, keep class scores only."""
    said = student_answers(student, prompt, encoded, words)
    return Constants(*said, answers(target, encoded, words), encoded.whole)


def student_answers(
    student: LanguageModel,
    prompt: SoftPrompt,
    encoded: EncodedRows,
    words: LabelWords | None,
    *,
    report: Reporter = ignore,
) -> tuple[Tensor, Tensor]:
    """Φs(p_s + x) and Φs(x); the latter, which only Eq. 5 looks at, is left empty with class scores."""
    passes = 1 if words else 2
    prompted = answers(student, encoded, words, prompt, report=in_turn(report, 0, passes, "student"))
    plain = None if words else answers(student, encoded, words, report=in_turn(report, 1, passes, "student"))
    return prompted, torch.empty(0) if plain is None else plain


def in_turn(report: Reporter, at: int, passes: int, stage: str = "constants") -> Reporter:
    """For pass number ``at`` of so many alike, which together are one stage."""
    return lambda each: report(Progress(at * each.steps + each.step, passes * each.steps, stage))


@torch.no_grad()
def answers(
    model: LanguageModel,
    encoded: EncodedRows,
    words: LabelWords | None,
    prompt: SoftPrompt | None = None,
    *,
    report: Reporter = ignore,
) -> Tensor:
    """What the model says at every answer position: logits (N, V) or, with ``words``, class scores (N, C)."""
    texts = encoded.whole
    found = torch.empty(len(texts.rows), len(words.weights) if words else model.vocabulary)
    tokens = words.token_ids if words else None
    size, most = AT_A_TIME.get(model.device.type, AT_A_TIME["cpu"])
    batches = texts.split(size, tokens=most, room=prompt.length if prompt else 0)
    for step, batch in enumerate(batches, 1):
        at = texts.answers_at(batch.index)
        if prompt:
            logits = model.answer_logits_shared(batch, prompt.embeddings, tokens=tokens)
        else:
            logits = model.answer_logits(batch, tokens=tokens)
        found[at] = (words.scores(logits) if words else logits).cpu()
        report(Progress(step, len(batches), "constants"))
    return found
