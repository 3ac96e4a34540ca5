"""When a job was queued, and how often its lease was lost.

Revision: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns without recreating the table: SQLite would delete the events that refer to it."""
    long_ago = sa.text("'1970-01-01 00:00:00'")
    op.add_column("jobs", sa.Column("queued_at", sa.DateTime(timezone=True), nullable=False, server_default=long_ago))
    op.execute("UPDATE jobs SET queued_at = created_at")
    op.add_column("jobs", sa.Column("lease_losses", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Drop the columns."""
    op.drop_column("jobs", "lease_losses")
    op.drop_column("jobs", "queued_at")
