"""Alembic migrations; :meth:`post_server.db.database.Database.migrate` runs them."""
