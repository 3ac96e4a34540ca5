"""What an API key is allowed, and what its provider sees of it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from post_shared.schemas.common import Document, Role


class Scope(StrEnum):
    """What a key may be used for. A key has those of its role, or some of them."""

    READ = "read"
    """See models, datasets, its own prompts and jobs (a provider: everyone's), and pull students."""
    TRANSFER = "transfer"
    """Push and delete prompts; transfer and evaluate."""
    PREDICT = "predict"
    """Ask a target model."""
    SCORES = "scores"
    """Get the labels' probabilities with the answers, which tell more about a prompt than the label alone."""
    PROVIDE = "provide"
    """Add public data, distil, report (provider)."""


SCOPES: dict[Role, tuple[Scope, ...]] = {
    Role.PROVIDER: tuple(Scope),
    Role.OWNER: (Scope.READ, Scope.TRANSFER, Scope.PREDICT, Scope.SCORES),
}
"""All that a role may."""


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
    requests_per_minute: int | None = Field(default=None, description="Null: the server's setting; 0: no limit.")
    running_jobs: int | None = Field(default=None, description="As above: jobs that run at a time.")
    job_priority: int = Field(default=0, description="Of the jobs that it orders; the higher come first.")
