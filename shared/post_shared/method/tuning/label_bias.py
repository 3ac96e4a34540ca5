"""The label bias of a prompt, measured on public text, and a tuning loss calibrated for it (not in the paper).

Early in tuning a prompt mostly shifts the class scores of *every* text by the same amount: the label bias of contextual
calibration (Zhao et al. 2021). On a student of eight layers, 95 % of the energy of the scores' gradients lies in that
one direction. With differential privacy this is fatal: a row's gradient is clipped as a whole, so what separates the
classes drowns in the noise. But the bias can be measured on public text and subtracted from each row's scores, and so
from its gradient *before* clipping, at no privacy cost.
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
from post_shared.model.language_model import LanguageModel
from post_shared.model.verbalizer import label_words

MIN_TEXTS = 16


def check_public(texts: Sequence[str], where: str = "the public set") -> None:
    """Raise :class:`DataInvalid` if there are too few different texts to measure a label bias on."""
    count = len(set(texts))
    if count < MIN_TEXTS:
        raise DataInvalid(f"{where} has {count} different texts; at least {MIN_TEXTS} are needed")


@dataclass(frozen=True)
class LabelBias:
    """Mean class scores over public texts, to first order around ``prompt``."""

    prompt: Tensor
    """(l, d)"""
    scores: Tensor
    """(C,), centred over the classes"""
    gradient: Tensor | None
    """(C, l, d); None if :meth:`CalibratedLoss.backward` backpropagates through the scores instead"""

    def of(self, prompts: Tensor) -> Tensor:
        """The label bias at other prompts: (l, d) -> (1, C) or, one per row, (B, l, d) -> (B, C)."""
        if self.gradient is None:
            if prompts.dim() == 3:
                raise RuntimeError("a gradient per row needs the label bias's own gradient: set per_row")
            return self.scores[None]
        difference = (prompts - self.prompt).reshape(-1, self.prompt.numel())
        return self.scores + difference @ self.gradient.flatten(1).T


class CalibratedLoss:
    """Cross-entropy of the class scores minus the label bias, plus KL(uniform || softmax(bias)).

    The first term separates the classes, the second drives the bias itself to zero. A row's value depends on that row,
    the prompt and public text, and on no other private row: per-row gradients stay per-row.
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
        """``per_row``: each row gets its own gradient, which needs that of the bias. Otherwise :meth:`backward` at the
        end of the step backpropagates once for all rows and classes.

        Raises:
            InvalidInput: a generation task.
            DataInvalid: fewer than :data:`MIN_TEXTS` public texts.
        """
        if task.is_generation:
            raise InvalidInput("public texts help with classes; a generation task has none: leave them out")
        check_public(texts)
        distinct = list(dict.fromkeys(texts))
        self.model, self.words, self.per_row = model, label_words(model, task), per_row
        encoded = encode_rows(model, task, distinct, max_length, reserved=reserved)
        self.batches = ShuffledBatches(encoded, batch_size, seed=0)
        self.held = 0 if per_row else self.batches.batch_size * (reserved + encoded.whole.longest)
        """Positions whose activations :meth:`measure` holds until :meth:`backward`."""
        self.bias: LabelBias | None = None
        self._mean: Tensor | None = None
        self._graphs = None if per_row else model.new_graphs()

    def measure(self, step: int, prompt: Tensor) -> None:
        """Measure the bias of ``prompt`` (l, d) on the public texts of ``step``: one forward pass and, with
        ``per_row``, C - 1 backward passes.

        Raises:
            InvalidInput: the outputs for public texts are NaN or infinite.
        """
        leaf = prompt.detach().clone().requires_grad_() if self.per_row else prompt
        with self.model.using_graphs(self._graphs):  # not the rows' graphs: those run before this backward pass
            logits = self.model.answer_logits(self.batches(step), leaf, tokens=self.words.token_ids)
        scores = self.words.scores(logits)  # (B, C)
        mean = (scores - scores.mean(1, keepdim=True)).mean(0)  # (C,)
        gradient = _gradient(mean, leaf) if self.per_row else None
        if not all(torch.isfinite(value).all() for value in (mean, gradient) if value is not None):
            raise InvalidInput("the student's outputs for the public texts are NaN or infinite; leave those texts out")
        self.bias = LabelBias(leaf.detach(), mean.detach().requires_grad_(not self.per_row), gradient)
        self._mean = None if self.per_row else mean

    def backward(self) -> None:
        """Backpropagate the gradient that the bias has received since :meth:`measure` to the prompt."""
        if self.bias is not None and self._mean is not None:
            self._mean.backward(self.bias.scores.grad)  # type: ignore[no-untyped-call]
            self._mean = self.bias = None

    def __call__(self, prompt: Tensor, batch: Batch) -> Tensor:
        if self.bias is None:
            raise RuntimeError("measure() must be called before the loss")
        scores = self.words.scores(self.model.answer_logits(batch, prompt, tokens=self.words.token_ids))  # (B, C)
        return calibrated_cross_entropy(scores, self.bias.of(prompt), batch.labels.to(scores.device))


def _gradient(mean: Tensor, prompt: Tensor) -> Tensor:
    """(C, l, d): the gradient of centred scores (C,). They add up to 0, so the last class needs no pass."""
    gradients = torch.stack([torch.autograd.grad(score, prompt, retain_graph=True)[0] for score in mean[:-1]])
    return torch.cat([gradients, -gradients.sum(0, keepdim=True)])


def calibrated_cross_entropy(scores: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of scores - bias, plus KL(uniform || softmax(bias)). (B, C), (B, C) or (1, C), (B,) -> (B,)."""
    uniform = torch.zeros_like(bias).log_softmax(-1)
    penalty = divergence(uniform, bias.log_softmax(-1))  # (B,) or (1,)
    return label_word_loss(scores - bias, labels) + penalty
