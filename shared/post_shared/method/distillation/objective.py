"""What a student is trained by: Eq. 1 on one batch, in parts if need be, and what it asks of the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from post_shared.data.batches import OPEN
from post_shared.method.distillation.corpus import TokenTargets
from post_shared.method.distillation.fused_losses import vocabulary_losses
from post_shared.method.distillation.teacher_cache import TeacherCache
from post_shared.method.losses import DISTILLATION_WEIGHTS, cosine_loss, distillation_loss
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import layer_inputs

ANSWER_WEIGHT = 1.0
"""Weight of the answer positions' own mean of L_ce beside that over all positions, of which they are few."""


@dataclass(frozen=True)
class Part:
    """Some rows of a batch, with the sizes of the whole batch, over which all means are taken."""

    prediction: TokenTargets
    blocks: Sequence[int]
    """The rows' numbers in the corpus."""
    positions: int
    """Predicted positions of the whole batch."""
    tokens: int
    """Tokens of the whole batch."""
    answers: int
    """Answer positions of the whole batch: those where no token is expected."""


def parts_of(prediction: TokenTargets, blocks: Sequence[int], count: int) -> list[Part]:
    """The batch in ``count`` parts of about as many rows each; the sums over all parts are the batch's means."""
    parts, answers = [], int((prediction.tokens == OPEN).sum())
    for rows in torch.arange(len(prediction.inputs)).tensor_split(count):
        first, last = int(rows[0]), int(rows[-1])
        mine = (prediction.rows >= first) & (prediction.rows <= last)
        some = TokenTargets(
            prediction.inputs[first : last + 1],
            prediction.rows[mine] - first,
            prediction.positions[mine],
            prediction.tokens[mine],
        )
        parts.append(Part(some, blocks[first : last + 1], len(prediction.rows), prediction.inputs.numel(), answers))
    return parts


def alignment_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖² of hidden states inside the models, (B, T, d) each -> (B, T).

    Not in the paper: what enters a kept layer in the student against what enters it in the target.
    """
    wanted = teacher.float()
    return (student.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-6)


class Objective:
    """Eq. 1, with L_ce at answer positions taken once more by itself, since that is where prompts are tuned; plus
    ``alignment`` times :func:`alignment_loss` over the layers that follow a kept one.
    """

    def __init__(
        self,
        target: LanguageModel,
        student: LanguageModel,
        temperature: float,
        *,
        kept: Sequence[int] = (),
        alignment: float = 0.0,
        cache: TeacherCache | None = None,
    ) -> None:
        self.target, self.student, self.temperature, self.alignment = target, student, temperature, alignment
        self._cache = cache
        self._entered = kept[1:] if alignment else ()
        """Layers of the target before which the two are compared."""

    def losses(self, part: Part) -> dict[str, Tensor]:
        """{"ce", "lm", "cos"}, where the batch has answer positions "answers", and with alignment "align": this part's
        share of each mean over the batch.
        """
        asked, device = part.prediction, self.target.device
        rows, positions = asked.rows.to(device), asked.positions.to(device)
        with torch.no_grad(), layer_inputs(self.target, self._entered) as wanted:
            right = self._right(part)  # (B, T, d)
            teacher = self.target.head(right[rows, positions])  # (n, V)
        with layer_inputs(self.student, range(1, 1 + len(self._entered))) as got:
            hidden = self.student.hidden(asked.inputs)  # (B, T, d)
        logits = self._head(hidden[rows, positions])  # (n, V)
        each, lm = vocabulary_losses(teacher, logits, asked.tokens.to(device), self.temperature)  # (n,)
        losses = {
            "ce": each.sum() / part.positions,
            "lm": lm.sum() / part.positions,
            "cos": cosine_loss(right, hidden).sum() / part.tokens,
        }
        if part.answers:
            losses["answers"] = each[asked.tokens.to(device) == OPEN].sum() / part.answers
        if self._entered:
            apart = [alignment_loss(wanted[layer], got[at]).sum() for at, layer in enumerate(self._entered, 1)]
            losses["align"] = torch.stack(apart).mean() / part.tokens
        return losses

    @property
    def _head(self) -> Callable[[Tensor], Tensor]:
        """The student's. A frozen one is the target's, rounded alike: then the target's does, which no step rounds."""
        rounds = self.target.dtype == self.student.dtype or torch.is_autocast_enabled(self.target.device.type)
        return (self.target if rounds and self._is_the_targets else self.student).head

    @cached_property
    def _is_the_targets(self) -> bool:
        return _same_head(self.target, self.student)

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """What is minimised."""
        total = distillation_loss(losses["ce"], losses["lm"], losses["cos"])
        if "answers" in losses:
            total = total + ANSWER_WEIGHT * DISTILLATION_WEIGHTS[0] * losses["answers"]
        return total + self.alignment * losses["align"] if "align" in losses else total

    def _right(self, part: Part) -> Tensor:
        """The target's last hidden states (B, T, d)."""
        if self._cache is None:
            return self.target.hidden(part.prediction.inputs)
        return self._cache.hidden(part.blocks, part.prediction.inputs)


def _same_head(target: LanguageModel, student: LanguageModel) -> bool:
    """Whether the student's head is frozen and, in the target's type, the target's."""

    def weights(model: LanguageModel) -> dict[str, Tensor]:
        body = f"{model.model.base_model_prefix}."
        every = model.model.named_parameters(remove_duplicate=False)  # a tied head's are the body's
        return {name: weight for name, weight in every if not name.startswith(body)}

    ours, theirs = weights(student), weights(target)
    return (
        bool(ours)
        and ours.keys() == theirs.keys()
        and all(
            not mine.requires_grad and not theirs[name].is_meta and torch.equal(mine.to(theirs[name]), theirs[name])
            for name, mine in ours.items()
        )
    )
