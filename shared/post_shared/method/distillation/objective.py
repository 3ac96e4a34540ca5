"""The distillation objective: Eq. 1 on one batch, if need be in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from post_shared.data.batches import IGNORE_INDEX
from post_shared.method.distillation.corpus import TokenTargets
from post_shared.method.distillation.fused_losses import vocabulary_losses
from post_shared.method.distillation.teacher_cache import TeacherCache
from post_shared.method.losses import DISTILLATION_WEIGHTS, cosine_loss, distillation_loss
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import layer_inputs

ANSWER_WEIGHT = 1.0
"""Weight of a second mean of L_ce, over the answer positions alone: among all positions they are few."""


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a batch, with the counts of the whole batch, by which all sums are divided."""

    targets: TokenTargets
    blocks: Sequence[int]
    """The rows' indices in the corpus."""
    positions: int
    """Predicted positions of the whole batch."""
    tokens: int
    """Tokens of the whole batch."""
    answers: int
    """Answer positions of the whole batch: those without an expected token (:data:`IGNORE_INDEX`)."""


def split_batch(targets: TokenTargets, blocks: Sequence[int], count: int) -> list[MicroBatch]:
    """Split a batch into ``count`` micro-batches of about equal size; their losses add up to the batch's means."""
    micro_batches, answers = [], int((targets.tokens == IGNORE_INDEX).sum())
    for rows in torch.arange(len(targets.inputs)).tensor_split(count):
        first, last = int(rows[0]), int(rows[-1])
        inside = (targets.rows >= first) & (targets.rows <= last)
        part = TokenTargets(
            targets.inputs[first : last + 1],
            targets.rows[inside] - first,
            targets.positions[inside],
            targets.tokens[inside],
        )
        micro_batches.append(
            MicroBatch(part, blocks[first : last + 1], len(targets.rows), targets.inputs.numel(), answers)
        )
    return micro_batches


def alignment_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖² of inner hidden states, (B, T, d) each -> (B, T).

    Not in the paper: compares the inputs of a kept layer in the student and in the target.
    """
    teacher = teacher.float()
    return (student.float() - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-6)


class Objective:
    """Eq. 1, plus a second mean of L_ce over the answer positions, where prompts are tuned later; plus ``alignment``
    times :func:`alignment_loss`, the mean over all kept layers but the first.
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
        self._aligned = kept[1:] if alignment else ()
        """Layers of the target whose inputs are compared."""

    def losses(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """{"ce", "lm", "cos"}; also "answers" if the batch has answer positions, and "align" with ``alignment``: the
        micro-batch's share of each mean over the batch. Scalars.
        """
        targets, device = micro_batch.targets, self.target.device
        rows, positions = targets.rows.to(device), targets.positions.to(device)
        with torch.no_grad(), layer_inputs(self.target, self._aligned) as teacher_inputs:
            teacher_hidden = self._teacher_hidden(micro_batch)  # (B, T, d)
            teacher = self.target.head(teacher_hidden[rows, positions])  # (n, V)
        with layer_inputs(self.student, range(1, 1 + len(self._aligned))) as student_inputs:
            hidden = self.student.hidden(targets.inputs)  # (B, T, d)
        logits = self._head(hidden[rows, positions])  # (n, V)
        ce, lm = vocabulary_losses(teacher, logits, targets.tokens.to(device), self.temperature)  # (n,)
        losses = {
            "ce": ce.sum() / micro_batch.positions,
            "lm": lm.sum() / micro_batch.positions,
            "cos": cosine_loss(teacher_hidden, hidden).sum() / micro_batch.tokens,
        }
        if micro_batch.answers:
            losses["answers"] = ce[targets.tokens.to(device) == IGNORE_INDEX].sum() / micro_batch.answers
        if self._aligned:
            align = [
                alignment_loss(teacher_inputs[layer], student_inputs[index]).sum()
                for index, layer in enumerate(self._aligned, 1)
            ]
            losses["align"] = torch.stack(align).mean() / micro_batch.tokens
        return losses

    @property
    def _head(self) -> Callable[[Tensor], Tensor]:
        """The student's; or the target's if equal, frozen and rounded alike: it needs no rounding in each step."""
        same_type = self.target.dtype == self.student.dtype or torch.is_autocast_enabled(self.target.device.type)
        return (self.target if same_type and self._shares_head else self.student).head

    @cached_property
    def _shares_head(self) -> bool:
        return _same_head(self.target, self.student)

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The loss that is minimised: Eq. 1 plus the additional terms. Scalars in, scalar out."""
        total = distillation_loss(losses["ce"], losses["lm"], losses["cos"])
        if "answers" in losses:
            total = total + ANSWER_WEIGHT * DISTILLATION_WEIGHTS[0] * losses["answers"]
        return total + self.alignment * losses["align"] if "align" in losses else total

    def _teacher_hidden(self, micro_batch: MicroBatch) -> Tensor:
        """The target's last hidden states (B, T, d)."""
        if self._cache is None:
            return self.target.hidden(micro_batch.targets.inputs)
        return self._cache.hidden(micro_batch.blocks, micro_batch.targets.inputs)


def _same_head(target: LanguageModel, student: LanguageModel) -> bool:
    """Whether the student's head is frozen and, in the target's type, equal to the target's."""

    def weights(model: LanguageModel) -> dict[str, Tensor]:
        body = f"{model.model.base_model_prefix}."
        named = model.model.named_parameters(remove_duplicate=False)  # a tied head's is the body's too
        return {name: weight for name, weight in named if not name.startswith(body)}

    head, target_head = weights(student), weights(target)
    return (
        bool(head)
        and head.keys() == target_head.keys()
        and all(
            not weight.requires_grad
            and not target_head[name].is_meta
            and torch.equal(weight.to(target_head[name]), target_head[name])
            for name, weight in head.items()
        )
    )
