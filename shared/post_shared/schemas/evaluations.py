"""The documents of ``/v1/evaluations``. Never imports torch."""

from __future__ import annotations

from pydantic import Field

from post_shared.schemas.common import Document, Reference
from post_shared.schemas.tasks import TaskSpec


class EvaluationCreate(Document):
    """Measure the accuracy of a model, with or without a prompt, on a labelled public dataset."""

    model: Reference = Field(description="Id or name of a target or student model.")
    dataset: Reference
    prompt: Reference | None = None
    task: TaskSpec | None = Field(default=None, description="Required without a prompt.")
    max_rows: int = Field(default=1000, ge=1, le=2**24)
