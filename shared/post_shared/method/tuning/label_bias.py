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

from post_shared.data.batches import Batch, ShuffledBatches
from post_shared.data.tasks import Task
from post_shared.errors import DataInvalid, InvalidInput
from post_shared.method.losses import divergence, label_word_loss
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel, Prompt, embeddings_of
from post_shared.model.verbalizer import label_words

MIN_TEXTS = 16


def check_public(texts: Sequence[str], where: str = "the public set") -> None:
    """Raise :class:`DataInvalid` when there are too few different texts to measure a lean on."""
    count = len(set(texts))
    if count < MIN_TEXTS:
        raise DataInvalid(f"{where} has {count} different texts; {MIN_TEXTS} are the least")


@dataclass(frozen=True)
class LabelBias:
    """Mean class scores over public texts, to first order around ``prompt``."""

    prompt: Tensor
    """(l, d)"""
    scores: Tensor
    """(C,), centred over the classes"""
    gradient: Tensor | None
    """(C, l, d); None if it is gone back through once, by :meth:`CalibratedLoss.settle`"""

    def of(self, prompts: Tensor) -> Tensor:
        """The lean at other prompts: (l, d) -> (1, C) or, one per row, (B, l, d) -> (B, C)."""
        if self.gradient is None:
            if prompts.dim() == 3:
                raise RuntimeError("a row's own gradient needs the lean's: per_row")
            return self.scores[None]
        moved = (prompts - self.prompt).reshape(-1, self.prompt.numel())
        return self.scores + moved @ self.gradient.flatten(1).T


class CalibratedLoss:
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
        reserved: int,
        per_row: bool = True,
    ) -> None:
        """``per_row``: rows' gradients are looked at one by one, so that each needs the lean's own. Else one pass
        backward through the lean does for all rows and all classes, at the end of the step.

        Raises:
            InvalidInput: a generation task.
            DataInvalid: fewer than :data:`MIN_TEXTS` public texts.
        """
        if task.is_generation:
            raise InvalidInput("public texts help with classes; a generation task has none: leave them out")
        check_public(texts)
        chosen = list(dict.fromkeys(texts))
        self.model, self.words, self.per_row = model, label_words(model, task), per_row
        encoded = encode_rows(model, task, chosen, max_length, reserved=reserved)
        self.batches = ShuffledBatches(encoded, batch_size, seed=0)
        self.held = 0 if per_row else self.batches.batch_size * (reserved + encoded.whole.longest)
        """Positions that :meth:`look` keeps for the way back until :meth:`settle`."""
        self.bias: LabelBias | None = None
        self._mean: Tensor | None = None
        self._graphs = None if per_row else model.new_graphs()

    def measure(self, step: int, prompt: Tensor) -> None:
        """Measure the lean of ``prompt`` (l, d) on the public texts of ``step``: one pass, and ``per_row`` C - 1 back.

        Raises:
            InvalidInput: the answers to public texts are no numbers.
        """
        leaf = prompt.detach().clone().requires_grad_() if self.per_row else prompt
        with self.model.replaying(self._graphs):  # apart from the rows', which run before this goes back
            logits = self.model.answer_logits(self.batches(step), leaf, tokens=self.words.token_ids)
        scores = self.words.scores(logits)  # (B, C)
        mean = (scores - scores.mean(1, keepdim=True)).mean(0)  # (C,)
        gradient = _gradient(mean, leaf) if self.per_row else None
        if not all(torch.isfinite(each).all() for each in (mean, gradient) if each is not None):
            raise InvalidInput("the student's answers to the public texts are no numbers; leave those texts out")
        self.bias = LabelBias(leaf.detach(), mean.detach().requires_grad_(not self.per_row), gradient)
        self._mean = None if self.per_row else mean

    def backward(self) -> None:
        """Add to the prompt's gradient what came back to the lean since :meth:`look`."""
        if self.bias is not None and self._mean is not None:
            self._mean.backward(self.bias.scores.grad)  # type: ignore[no-untyped-call]
            self._mean = self.bias = None

    def __call__(self, prompt: Prompt, batch: Batch) -> Tensor:
        if self.bias is None:
            raise RuntimeError("look() comes before the first loss")
        scores = self.words.scores(self.model.answer_logits(batch, prompt, tokens=self.words.token_ids))  # (B, C)
        return calibrated_cross_entropy(scores, self.bias.of(embeddings_of(prompt)), batch.labels.to(scores.device))


def _gradient(mean: Tensor, prompt: Tensor) -> Tensor:
    """(C, l, d) of centred scores (C,), which add up to 0."""
    known = torch.stack([torch.autograd.grad(each, prompt, retain_graph=True)[0] for each in mean[:-1]])
    return torch.cat([known, -known.sum(0, keepdim=True)])


def calibrated_cross_entropy(scores: Tensor, calibrated: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of scores less the lean, plus KL(even || lean). (B, C), (B, C) or (1, C), (B,) -> (B,)."""
    even = torch.zeros_like(calibrated).log_softmax(-1)
    pull = divergence(even, calibrated.log_softmax(-1))  # (B,) or (1,)
    return label_word_loss(scores - calibrated, labels) + pull
