"""API keys: their scopes, and the document that shows a key to the provider."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from post_shared.schemas.common import Document, Role


class Scope(StrEnum):
    """What a key may be used for. A key has all scopes of its role, or some of them."""

    READ = "read"
    """Read models, datasets, its own prompts and jobs (a provider: everyone's), and download students."""
    TRANSFER = "transfer"
    """Upload and delete prompts; transfer and evaluate."""
    PREDICT = "predict"
    """Get predictions from a target model."""
    SCORES = "scores"
    """Also get the label probabilities, which reveal more about a prompt than the labels alone."""
    PROVIDE = "provide"
    """Add public data, distil, create reports (provider)."""


SCOPES: dict[Role, tuple[Scope, ...]] = {
    Role.PROVIDER: tuple(Scope),
    Role.OWNER: (Scope.READ, Scope.TRANSFER, Scope.PREDICT, Scope.SCORES),
}
"""The scopes of each role."""


class ApiKey(Document):
    """A key without its secret."""

    id: str
    name: str
    role: Role
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None = None
    rotated_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None
    requests_per_minute: int | None = Field(default=None, description="Null: the server's default; 0: no limit.")
    running_jobs: int | None = Field(
        default=None, description="Limit on jobs that run at a time. Null: the server's default; 0: no limit."
    )
    job_priority: int = Field(
        default=0, description="Priority of the key's jobs; jobs with a higher priority start first."
    )
