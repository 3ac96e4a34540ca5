"""The distillation losses of one batch, computed by the code that distillation runs."""

from __future__ import annotations

from torch import Tensor

from post_shared.method.distillation.corpus import TokenTargets
from post_shared.method.distillation.objective import Objective, split_batch
from post_shared.model.language_model import LanguageModel


def distillation_losses(target: LanguageModel, student: LanguageModel, batch: TokenTargets) -> dict[str, Tensor]:
    """The three terms of Eq. 1, each a mean: {"ce", "lm", "cos"}."""
    (whole,) = split_batch(batch, range(len(batch.inputs)), 1)
    return Objective(target, student, temperature=2.0).losses(whole)
