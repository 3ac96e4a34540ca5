"""What a prompt leans to, measured on public text, and tuning that is freed of it.

At first a prompt changes mostly one thing: how far *every* text leans to some classes. Measured on a student of eight
layers, 95 % of the energy of the class scores' gradients lies in that one direction. With differential privacy this
is fatal: a row's gradient is clipped as a whole, so what tells classes apart drowns in the noise. But the lean is
no secret. It shows on public text, so it can be taken off every row's gradient *before* clipping, at no privacy cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from post_shared.batches import Batch, ShuffledBatches, encode_rows
from post_shared.errors import DataInvalid, InvalidInput
from post_shared.label_words import label_words
from post_shared.language_model import LanguageModel
from post_shared.losses import divergence, label_word_loss
from post_shared.packing import logits_behind
from post_shared.replays import recorder_of, replays
from post_shared.tasks import Task

LEAST_TEXTS = 16


def check_public(texts: Sequence[str], where: str = "the public set") -> None:
    """Raise :class:`DataInvalid` when there are too few different texts to measure a lean on."""
    count = len(set(texts))
    if count < LEAST_TEXTS:
        raise DataInvalid(f"{where} has {count} different texts; {LEAST_TEXTS} are the least")


@dataclass(frozen=True)
class Lean:
    """Mean class scores over public texts, to first order around ``prompt``."""

    prompt: Tensor
    """(l, d)"""
    scores: Tensor
    """(C,), centred over the classes"""
    gradient: Tensor | None
    """(C, l, d); None if it is gone back through once, by :meth:`LeanFreeLoss.settle`"""

    def of(self, prompts: Tensor) -> Tensor:
        """The lean at other prompts: (l, d) -> (1, C) or, one per row, (B, l, d) -> (B, C)."""
        if self.gradient is None:
            if prompts.dim() == 3:
                raise RuntimeError("a row's own gradient needs the lean's: per_row")
            return self.scores[None]
        moved = (prompts - self.prompt).reshape(-1, self.prompt.numel())
        return self.scores + moved @ self.gradient.flatten(1).T


class LeanFreeLoss:
    """Cross-entropy of the class scores less the lean, plus the KL of the lean's classes from all being alike.

    The first term learns what tells the classes apart, the second takes the lean itself to zero. A row's value depends
    on that row, the prompt and public text, and on no other private row: per-row gradients stay per-row.
    """

    def __init__(
        self,
        model: LanguageModel,
        task: Task,
        texts: Sequence[str],
        *,
        batch_size: int,
        max_length: int,
        room: int,
        per_row: bool = True,
    ) -> None:
        """``per_row``: rows' gradients are looked at one by one, so that each needs the lean's own. Else one pass
        backward through the lean does for all rows and all classes, at the end of the step.

        Raises:
            InvalidInput: a generation task.
            DataInvalid: fewer than :data:`LEAST_TEXTS` public texts.
        """
        if task.is_generation:
            raise InvalidInput("public texts help with classes; a generation task has none: leave them out")
        check_public(texts)
        chosen = list(dict.fromkeys(texts))
        self.model, self.words, self.per_row = model, label_words(model, task), per_row
        encoded = encode_rows(model, task, chosen, max_length, room=room)
        self.batches = ShuffledBatches(encoded, batch_size, seed=0)
        self.held = 0 if per_row else self.batches.batch_size * (room + encoded.whole.longest)
        """Positions that :meth:`look` keeps for the way back until :meth:`settle`."""
        self.lean: Lean | None = None
        self._mean: Tensor | None = None
        self._recorder = None if per_row else recorder_of(model)

    def look(self, step: int, prompt: Tensor) -> None:
        """Measure the lean of ``prompt`` (l, d) on the public texts of ``step``: one pass, and ``per_row`` C - 1 back.

        Raises:
            InvalidInput: the answers to public texts are no numbers.
        """
        leaf = prompt.detach().clone().requires_grad_() if self.per_row else prompt
        with replays(self.model, self._recorder):  # apart from the rows', which run before this goes back
            logits = self.model.answer_logits_shared(self.batches(step), leaf, tokens=self.words.token_ids)
        scores = self.words.scores(logits)  # (B, C)
        mean = (scores - scores.mean(1, keepdim=True)).mean(0)  # (C,)
        gradient = _gradient(mean, leaf) if self.per_row else None
        if not all(torch.isfinite(each).all() for each in (mean, gradient) if each is not None):
            raise InvalidInput("the student's answers to the public texts are no numbers; leave those texts out")
        self.lean = Lean(leaf.detach(), mean.detach().requires_grad_(not self.per_row), gradient)
        self._mean = None if self.per_row else mean

    def settle(self) -> None:
        """Add to the prompt's gradient what came back to the lean since :meth:`look`."""
        if self.lean is not None and self._mean is not None:
            self._mean.backward(self.lean.scores.grad)  # type: ignore[no-untyped-call]
            self._mean = self.lean = None

    def __call__(self, prompt: Tensor, batch: Batch) -> Tensor:
        if self.lean is None:
            raise RuntimeError("look() comes before the first loss")
        scores = self.words.scores(logits_behind(self.model, batch, prompt, self.words.token_ids))  # (B, C)
        return lean_free(scores, self.lean.of(prompt), batch.labels.to(scores.device))


def _gradient(mean: Tensor, prompt: Tensor) -> Tensor:
    """(C, l, d) of centred scores (C,), which add up to 0."""
    known = torch.stack([torch.autograd.grad(each, prompt, retain_graph=True)[0] for each in mean[:-1]])
    return torch.cat([known, -known.sum(0, keepdim=True)])


def lean_free(scores: Tensor, lean: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of scores less the lean, plus KL(even || lean). (B, C), (B, C) or (1, C), (B,) -> (B,)."""
    even = torch.zeros_like(lean).log_softmax(-1)
    pull = divergence(even, lean.log_softmax(-1))  # (B,) or (1,)
    return label_word_loss(scores - lean, labels) + pull
