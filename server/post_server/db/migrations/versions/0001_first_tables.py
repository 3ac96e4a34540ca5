"""The first tables.

Revision: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create all tables, referenced ones first."""
    _api_keys()
    _models()
    _datasets()
    _prompts()
    _jobs()
    _job_events()
    _idempotency()


def downgrade() -> None:
    """Drop everything."""
    for table in ("idempotency", "job_events", "jobs", "prompts", "datasets", "models", "api_keys"):
        op.drop_table(table)


def _id(name: str = "id") -> sa.Column[str]:
    return sa.Column(name, sa.String(32), nullable=False)


def _time(name: str, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _json(name: str, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.JSON(none_as_null=True), nullable=nullable)


def _words(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.String(16), nullable=False)


def _api_keys() -> None:
    op.create_table(
        "api_keys",
        _id(),
        sa.Column("name", sa.String(64), nullable=False),
        _words("role"),
        sa.Column("key_hash", sa.String(64), nullable=False),
        _time("created_at"),
        _time("revoked_at", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("key_hash", name="uq_api_keys_key_hash"),
    )


def _models() -> None:
    op.create_table(
        "models",
        _id(),
        sa.Column("name", sa.String(64), nullable=False),
        _words("role"),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("architecture", sa.String(128), nullable=False),
        sa.Column("layers", sa.Integer(), nullable=False),
        sa.Column("hidden_size", sa.Integer(), nullable=False),
        sa.Column("vocabulary", sa.Integer(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        _json("files"),
        sa.Column("target_id", sa.String(32), nullable=True),
        _time("created_at"),
        sa.ForeignKeyConstraint(["target_id"], ["models.id"], name="fk_models_target_id"),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
        sa.UniqueConstraint("name", name="uq_models_name"),
    )
    op.create_index("ix_models_created_at", "models", ["created_at"])
    op.create_index("ix_models_hash", "models", ["hash"])


def _datasets() -> None:
    op.create_table(
        "datasets",
        _id(),
        sa.Column("name", sa.String(64), nullable=False),
        _words("kind"),
        sa.Column("rows", sa.Integer(), nullable=False),
        _json("labels", nullable=True),
        sa.Column("licence", sa.String(128), nullable=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        _time("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_datasets"),
        sa.UniqueConstraint("name", name="uq_datasets_name"),
    )
    op.create_index("ix_datasets_created_at", "datasets", ["created_at"])


def _prompts() -> None:
    op.create_table(
        "prompts",
        _id(),
        _words("role"),
        _id("owner_key_id"),
        _id("model_id"),
        sa.Column("model_hash", sa.String(64), nullable=False),
        sa.Column("length", sa.Integer(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        _json("task"),
        sa.Column("epsilon", sa.Double(), nullable=True),
        sa.Column("delta", sa.Double(), nullable=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("source_id", sa.String(32), nullable=True),
        _time("created_at"),
        sa.ForeignKeyConstraint(["owner_key_id"], ["api_keys.id"], name="fk_prompts_owner_key_id"),
        sa.ForeignKeyConstraint(["model_id"], ["models.id"], name="fk_prompts_model_id"),
        sa.ForeignKeyConstraint(["source_id"], ["prompts.id"], name="fk_prompts_source_id", ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name="pk_prompts"),
    )
    op.create_index("ix_prompts_created_at", "prompts", ["created_at"])
    op.create_index("ix_prompts_sha256", "prompts", ["sha256"])
    source = sa.text("role = 'source'")
    op.create_index(
        "uq_prompts_source_sha256",
        "prompts",
        ["owner_key_id", "sha256"],
        unique=True,
        sqlite_where=source,
        postgresql_where=source,
    )


def _jobs() -> None:
    op.create_table(
        "jobs",
        _id(),
        _words("kind"),
        _words("state"),
        _json("request"),
        _id("owner_key_id"),
        sa.Column("attempt", sa.Integer(), nullable=False),
        _time("lease_until", nullable=True),
        _time("heartbeat_at", nullable=True),
        sa.Column("token", sa.String(64), nullable=True),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("stage", sa.String(64), nullable=True),
        _json("metrics"),
        _json("result", nullable=True),
        _json("error", nullable=True),
        _time("cancel_requested_at", nullable=True),
        _time("created_at"),
        _time("started_at", nullable=True),
        _time("finished_at", nullable=True),
        sa.ForeignKeyConstraint(["owner_key_id"], ["api_keys.id"], name="fk_jobs_owner_key_id"),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_created_at", "jobs", ["created_at"])
    op.create_index("ix_jobs_state_lease_until", "jobs", ["state", "lease_until"])
    op.create_index("ix_jobs_owner_key_id_created_at", "jobs", ["owner_key_id", "created_at"])


def _job_events() -> None:
    op.create_table(
        "job_events",
        _id("job_id"),
        sa.Column("sequence", sa.Integer(), autoincrement=False, nullable=False),
        _time("at"),
        _words("kind"),
        _json("data"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_events_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "sequence", name="pk_job_events"),
    )


def _idempotency() -> None:
    op.create_table(
        "idempotency",
        _id("key_id"),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("body_hash", sa.String(64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        _json("response"),
        _time("created_at"),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name="fk_idempotency_key_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("key_id", "key", name="pk_idempotency"),
    )
    op.create_index("ix_idempotency_created_at", "idempotency", ["created_at"])
