"""API keys get scopes, an expiry, a previous hash and a last use.

Revision: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TIMES = ("expires_at", "rotated_at", "previous_until", "last_used_at")


def upgrade() -> None:
    """Existing keys keep all scopes of their role: theirs are null."""
    op.add_column("api_keys", sa.Column("scopes", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("api_keys", sa.Column("previous_hash", sa.String(64), nullable=True))
    for name in _TIMES:
        op.add_column("api_keys", sa.Column(name, sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_api_keys_previous_hash", "api_keys", ["previous_hash"], unique=True)


def downgrade() -> None:
    """Drop the columns."""
    op.drop_index("ix_api_keys_previous_hash", "api_keys")
    for name in ("scopes", "previous_hash", *_TIMES):
        op.drop_column("api_keys", name)
