"""Jobs have a priority and may need a device; a key has a limit on running jobs and a priority.

Revision: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Existing jobs get the default priority and may run on any device."""
    op.add_column("jobs", sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("device", sa.String(16), nullable=True))
    op.add_column("api_keys", sa.Column("running_jobs", sa.Integer(), nullable=True))
    op.add_column("api_keys", sa.Column("job_priority", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Drop the columns."""
    for table, column in (
        ("jobs", "priority"),
        ("jobs", "device"),
        ("api_keys", "running_jobs"),
        ("api_keys", "job_priority"),
    ):
        op.drop_column(table, column)
