"""The document of ``/healthz`` and ``/readyz``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from post_shared.schemas.common import Document


class Health(Document):
    status: Literal["ok", "unavailable"]
    checks: dict[str, str] = Field(default_factory=dict)
