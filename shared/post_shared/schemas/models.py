"""The documents of ``/v1/models``. Never imports torch."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import Field

from post_shared.schemas.common import Document, Name, Sha256


class ModelRole(StrEnum):
    TARGET = "target"
    STUDENT = "student"


class Model(Document):
    id: str
    name: Name
    role: ModelRole
    hash: Sha256 = Field(description="SHA-256 of the manifest; a prompt refers to its model by this hash.")
    kind: Literal["causal", "masked"]
    architecture: str
    layers: int
    hidden_size: int
    vocabulary: int
    parameters: int
    size_bytes: int
    target_id: str | None = Field(default=None, description="For a student: the target model it was distilled from.")
    created_at: datetime


class ModelFile(Document):
    path: str
    size: int
    sha256: Sha256


class ModelManifest(Document):
    """Every file of a model. ``hash`` is the SHA-256 of the canonical JSON of ``files``."""

    model_id: str
    name: Name
    hash: Sha256
    files: list[ModelFile]
