"""The documents of uploads in parts. Never imports torch."""

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
    """Start the upload of a dataset in parts (provider)."""

    name: Name
    kind: DatasetKind
    licence: LicenceName | None = None


class UploadPart(Document):
    number: int
    sha256: Sha256
    size_bytes: int


class Upload(Document):
    """A dataset whose parts are being uploaded. It is deleted at ``expires_at``."""

    id: str
    name: Name
    kind: DatasetKind
    licence: str | None = None
    parts: list[UploadPart] = Field(description="The parts received so far, by number.")
    part_bytes: int = Field(description="Maximum size of a part.")
    most_parts: int = Field(description="Maximum number of parts.")
    total_bytes: int = Field(description="Maximum size of all parts together.")
    created_at: datetime
    expires_at: datetime


class UploadFinish(Document):
    """Create the dataset from the parts 1, 2, 3 …"""

    sha256: Sha256 | None = Field(
        None, description="Expected SHA-256 of all parts together; if it differs, the upload is refused."
    )
