"""The documents of ``/v1/prompts``. Never imports torch."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from post_shared.schemas.common import Document, Sha256
from post_shared.schemas.tasks import TaskSpec


class PromptRole(StrEnum):
    SOURCE = "source"
    TARGET = "target"


class Prompt(Document):
    id: str
    role: PromptRole
    model_id: str
    model_hash: Sha256
    length: int
    width: int
    task: TaskSpec
    epsilon: float | None = None
    delta: float | None = None
    sha256: Sha256
    size_bytes: int
    source_id: str | None = Field(
        default=None, description="For a target prompt: the source prompt it was transferred from."
    )
    created_at: datetime
