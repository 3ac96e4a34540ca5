"""Run migrations on the caller's connection, or on POST_DATABASE_URL."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from post_server.db.database import Database
from post_server.db.tables import Base
from post_server.settings import get_settings


def run(connection: Connection) -> None:
    """Migrate within the connection's transaction."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_type=True,
        render_as_batch=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


existing = context.config.attributes.get("connection")
if existing is not None:
    run(existing)
else:
    with Database.from_settings(get_settings()).engine.begin() as connection:
        run(connection)
