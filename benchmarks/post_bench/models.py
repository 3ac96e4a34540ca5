"""The target model as the benchmarks load it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch

from post_shared.engine.devices import training_dtype
from post_shared.model.language_model import LanguageModel


def target_and_teacher(source: str | Path, device: str) -> tuple[LanguageModel, LanguageModel]:
    """The target as it is measured, and as a worker trains with it: one and the same where both have one type."""
    model = LanguageModel.load(source, device=device)
    if training_dtype(model.device, model.hidden_size) == model.dtype:
        return model, model
    return model, LanguageModel.load(source, device=device, teaches=True)


def in_type(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The same model, or a copy of it where it computes in another type."""
    return model if model.dtype == dtype else LanguageModel(deepcopy(model.model).to(dtype), model.tokenizer)
