"""The documents of ``/v1/predictions``. Never imports torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from post_shared.schemas.common import Document, Reference
from post_shared.schemas.tasks import TaskSpec


class PredictionCreate(Document):
    """Ask a target model, through a prompt or (zero-shot) through a task alone."""

    model: Reference = Field(description="Id or name of the target model.")
    prompt: Reference | None = Field(default=None, description="Id of a target or source prompt of the model's width.")
    task: TaskSpec | None = Field(default=None, description="Needed when there is no prompt.")
    texts: list[Annotated[str, Field(min_length=1, max_length=20_000)]] = Field(min_length=1, max_length=256)
    max_new_tokens: int = Field(default=16, ge=1, le=256, description="Generation tasks only.")


class Prediction(Document):
    label: str | None = Field(default=None, description="The label with the highest score; null for generation.")
    scores: dict[str, float] = Field(default_factory=dict, description="Label -> probability.")
    text: str | None = Field(default=None, description="The generated answer; null for classification.")
    truncated: bool = Field(default=False, description="The text was too long for the model and lost its end.")


class Predictions(Document):
    model_id: str
    prompt_id: str | None
    items: list[Prediction]
