"""The losses of one whole batch, by the code that distillation runs."""

from __future__ import annotations

from torch import Tensor

from post_shared.method.distillation.corpus import TokenTargets
from post_shared.method.distillation.objective import Objective, parts_of
from post_shared.model.language_model import LanguageModel


def distillation_losses(target: LanguageModel, student: LanguageModel, asked: TokenTargets) -> dict[str, Tensor]:
    """The three terms of Eq. 1, each a mean: {"ce", "lm", "cos"}."""
    (whole,) = parts_of(asked, range(len(asked.inputs)), 1)
    return Objective(target, student, temperature=2.0).losses(whole)
