"""Documents about the inside of a dataset and about uploads in parts. Never imports torch."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from post_shared.schemas.common import Document, Name, Sha256
from post_shared.schemas.datasets import DatasetKind

MAX_PARTS = 1000
LicenceName = Annotated[
    str, Field(min_length=1, max_length=128, pattern=r"^[\x20-\x7e]+$", description="SPDX id or a few words.")
]


class UploadCreate(Document):
    """Begin the upload of a dataset in parts (provider)."""

    name: Name
    kind: DatasetKind
    licence: LicenceName | None = None


class UploadPart(Document):
    number: int
    sha256: Sha256
    size_bytes: int


class Upload(Document):
    """A dataset of which the parts are still coming. It is forgotten a day after it was begun."""

    id: str
    name: Name
    kind: DatasetKind
    licence: str | None = None
    parts: list[UploadPart] = Field(description="Those that are here, by number.")
    part_bytes: int = Field(description="Largest part.")
    most_parts: int
    total_bytes: int = Field(description="Largest sum of all parts.")
    created_at: datetime
    expires_at: datetime


class UploadFinish(Document):
    """Make the dataset of the parts 1, 2, 3 …"""

    sha256: Sha256 | None = Field(None, description="Of all parts together; another one is refused.")
