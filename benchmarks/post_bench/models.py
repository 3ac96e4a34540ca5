"""The target model as the benchmarks load it."""

from __future__ import annotations

from pathlib import Path

from post_shared.devices import training_dtype
from post_shared.language_model import LanguageModel


def target_and_teacher(source: str | Path, device: str) -> tuple[LanguageModel, LanguageModel]:
    """The target as it is measured, and as a worker trains with it: one and the same where both have one type."""
    model = LanguageModel.load(source, device=device)
    if training_dtype(model.device, model.hidden_size) == model.dtype:
        return model, model
    return model, LanguageModel.load(source, device=device, teaches=True)
