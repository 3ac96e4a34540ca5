"""The tables of the database.

Rows are plain; the code that changes them lives with its feature (``jobs``, ``models``, …).
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    Index,
    MetaData,
    String,
    TypeDecorator,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from post_shared.schemas.common import Role
from post_shared.schemas.datasets import DatasetKind
from post_shared.schemas.jobs import JobKind, JobState
from post_shared.schemas.models import ModelRole
from post_shared.schemas.prompts import PromptRole

_ID_BYTES = 12


def new_id(prefix: str) -> str:
    """A new id such as ``job_4f…``: the prefix and 24 random hex digits."""
    return f"{prefix}_{secrets.token_hex(_ID_BYTES)}"


def now() -> datetime:
    """The current time, timezone-aware and in UTC, as all times in the database."""
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """Timezone-aware UTC times in every database; SQLite doesn't store the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse a naive time and store UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("times in the database need a time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return a timezone-aware time."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _enum_column(kind: type[StrEnum]) -> Enum:
    """A text column with the enum's values, so that a new member needs no migration."""
    return Enum(kind, native_enum=False, length=16, values_callable=lambda enum: [member.value for member in enum])


class Base(DeclarativeBase):
    """Base of all rows. Constraint names are fixed, so that migrations can refer to them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime,
        dict[str, Any]: JSON(none_as_null=True),
        list[dict[str, Any]]: JSON(none_as_null=True),
        list[str]: JSON(none_as_null=True),
        Role: _enum_column(Role),
        ModelRole: _enum_column(ModelRole),
        DatasetKind: _enum_column(DatasetKind),
        PromptRole: _enum_column(PromptRole),
        JobKind: _enum_column(JobKind),
        JobState: _enum_column(JobState),
    }


class ApiKeyRow(Base):
    """An API key. Only its SHA-256 is stored, never the key itself."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: new_id("key"))
    name: Mapped[str] = mapped_column(String(64))
    role: Mapped[Role]
    key_hash: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[str] | None]
    """:class:`post_shared.schemas.keys.Scope` values; null: all scopes of the role."""
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    rotated_at: Mapped[datetime | None]
    previous_hash: Mapped[str | None] = mapped_column(String(64), unique=True, index=True)
    """Hash of the key before the last rotation; it is valid until ``previous_until``."""
    previous_until: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    requests_per_minute: Mapped[int | None]
    running_jobs: Mapped[int | None]
    """For both limits, null means the server's setting and 0 no limit."""
    job_priority: Mapped[int] = mapped_column(default=0)
    """Priority of the key's new jobs."""
    revoked_at: Mapped[datetime | None]


class ModelRow(Base):
    """A target or student model: its facts and the blobs of its files."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: new_id("mod"))
    name: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[ModelRole]
    hash: Mapped[str] = mapped_column(String(64), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    architecture: Mapped[str] = mapped_column(String(128))
    layers: Mapped[int]
    hidden_size: Mapped[int]
    vocabulary: Mapped[int]
    parameters: Mapped[int] = mapped_column(BigInteger)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    files: Mapped[list[dict[str, Any]]]
    """``[{"path", "size", "sha256"}]``, sorted by path; see :class:`post_shared.schemas.models.ModelFile`."""
    target_id: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)


class DatasetRow(Base):
    """A public dataset: one blob of JSON Lines or plain text."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: new_id("set"))
    name: Mapped[str] = mapped_column(String(64), unique=True)
    kind: Mapped[DatasetKind]
    rows: Mapped[int]
    labels: Mapped[list[str] | None]
    licence: Mapped[str | None] = mapped_column(String(128))
    sha256: Mapped[str] = mapped_column(String(64))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)


class UploadRow(Base):
    """An unfinished upload of a dataset in parts."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: new_id("upl"))
    owner_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(String(64))
    kind: Mapped[DatasetKind]
    licence: Mapped[str | None] = mapped_column(String(128))
    parts: Mapped[list[dict[str, Any]]]
    """``[{"number", "sha256", "size_bytes"}]``, by number; see :class:`post_shared.schemas.uploads.UploadPart`."""
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)


class PromptRow(Base):
    """A source prompt that an owner pushed, or the target prompt that a transfer made from it."""

    __tablename__ = "prompts"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: new_id("prm"))
    role: Mapped[PromptRole]
    owner_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    model_hash: Mapped[str] = mapped_column(String(64))
    length: Mapped[int]
    width: Mapped[int]
    task: Mapped[dict[str, Any]]
    """A :class:`post_shared.schemas.tasks.TaskSpec` document."""
    epsilon: Mapped[float | None]
    delta: Mapped[float | None]
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    source_id: Mapped[str | None] = mapped_column(ForeignKey("prompts.id", ondelete="SET NULL"))
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)

    __table_args__ = (
        # The same bytes pushed twice by one key are one source prompt. Target prompts may be duplicates.
        Index(
            "uq_prompts_source_sha256",
            "owner_key_id",
            "sha256",
            unique=True,
            sqlite_where=text("role = 'source'"),
            postgresql_where=text("role = 'source'"),
        ),
    )


class JobRow(Base):
    """One job. The row is the source of truth; the broker only notifies workers.

    ``token`` is the fencing token of the worker that holds the lease until ``lease_until``.
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: new_id("job"))
    kind: Mapped[JobKind]
    state: Mapped[JobState] = mapped_column(default=JobState.QUEUED)
    request: Mapped[dict[str, Any]]
    owner_key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    priority: Mapped[int] = mapped_column(default=0)
    device: Mapped[str | None] = mapped_column(String(16))
    """The class of device that the job needs; null: any."""
    queued_at: Mapped[datetime] = mapped_column(default=now)
    """When the job was last queued, or will be after a pause."""
    attempt: Mapped[int] = mapped_column(default=0)
    lease_losses: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime | None]
    token: Mapped[str | None] = mapped_column(String(64))
    progress: Mapped[float] = mapped_column(default=0.0)
    stage: Mapped[str | None] = mapped_column(String(64))
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    """A :class:`post_shared.schemas.common.Problem` document."""
    cancel_requested_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __table_args__ = (Index(None, "state", "lease_until"), Index(None, "owner_key_id", "created_at"))


class JobEventRow(Base):
    """One event of a job; ``sequence`` counts from 1 within the job."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(default=now)
    kind: Mapped[str] = mapped_column(String(16))
    """``state``, ``progress``, ``metrics`` or ``log``."""
    data: Mapped[dict[str, Any]]


class IdempotencyRow(Base):
    """The response to a create request with an ``Idempotency-Key``, kept for a day."""

    __tablename__ = "idempotency"
    kept: ClassVar[timedelta] = timedelta(days=1)

    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    body_hash: Mapped[str] = mapped_column(String(64))
    status: Mapped[int]
    response: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)


class AuditRow(Base):
    """A line of the audit log. The database refuses to update or delete it; see :mod:`post_server.auth.audit_log`."""

    __tablename__ = "audit_log"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[datetime] = mapped_column(default=now)
    who: Mapped[str] = mapped_column(String(64), index=True)
    """The id of a key, or ``local:USER`` for commands on the provider's machine. No foreign key: lines outlive keys."""
    action: Mapped[str] = mapped_column(String(32))
    thing: Mapped[str] = mapped_column(String(64), index=True)
    request_id: Mapped[str | None] = mapped_column(String(64))
