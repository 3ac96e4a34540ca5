"""Alembic migrations; :meth:`post_server.database.Database.migrate` runs them."""
