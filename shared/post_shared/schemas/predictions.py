"""The documents of ``/v1/predictions``. Never imports torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from post_shared.schemas.common import Document, Reference
from post_shared.schemas.tasks import TaskSpec


class PredictionCreate(Document):
    """Get predictions from a target model, with a prompt or (zero-shot) with only a task."""

    model: Reference = Field(description="Id or name of the target model.")
    prompt: Reference | None = Field(
        default=None, description="Id of a target or source prompt whose width fits the model."
    )
    task: TaskSpec | None = Field(default=None, description="Required without a prompt.")
    texts: list[Annotated[str, Field(min_length=1, max_length=20_000)]] = Field(min_length=1, max_length=256)
    max_new_tokens: int = Field(default=16, ge=1, le=256, description="Generation tasks only.")


class Prediction(Document):
    label: str | None = Field(default=None, description="The label with the highest score; null for generation.")
    scores: dict[str, float] = Field(default_factory=dict, description="Label -> probability.")
    text: str | None = Field(default=None, description="The generated answer; null for classification.")
    truncated: bool = Field(
        default=False, description="Whether the text was too long for the model and was truncated at its end."
    )


class Predictions(Document):
    model_id: str
    prompt_id: str | None
    items: list[Prediction]
