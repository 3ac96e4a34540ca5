"""The documents of ``/v1/datasets``. Never imports torch."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from post_shared.schemas.common import Document, Name, Sha256


class DatasetKind(StrEnum):
    ROWS = "rows"
    """JSON Lines with ``text`` and, if labelled, ``label``."""
    CORPUS = "corpus"
    """Plain text, one paragraph per line."""


class Dataset(Document):
    """A public dataset at the provider. Private data is never uploaded."""

    id: str
    name: Name
    kind: DatasetKind
    rows: int
    labels: list[str] | None = Field(
        default=None,
        description="Sorted labels of the data; null if unlabelled, empty if there are too many (free answers).",
    )
    licence: str | None = None
    sha256: Sha256
    size_bytes: int
    created_at: datetime


class PreviewRow(Document):
    text: str = Field(description="The text, or its first 2,000 characters.")
    label: str | None = None


class DatasetPreview(Document):
    """The first rows or paragraphs of a public dataset."""

    dataset_id: str
    items: list[PreviewRow]
