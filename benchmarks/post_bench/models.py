"""Loads the target model for the benchmarks."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch

from post_shared.model.language_model import LanguageModel


def target_and_teacher(source: str | Path, device: str) -> tuple[LanguageModel, LanguageModel]:
    """The target for measurements and as a worker's teacher: the same object if both have the same dtype."""
    model = LanguageModel.load(source, device=device)
    if model.training_precision.dtype == model.dtype:
        return model, model
    return model, LanguageModel.load(source, device=device, for_training=True)


def in_type(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The model, or a copy in ``dtype`` if it has another dtype."""
    return model if model.dtype == dtype else LanguageModel(deepcopy(model.model).to(dtype), model.tokenizer)
