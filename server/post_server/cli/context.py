"""Shared by the commands: the services of the settings, and the format of a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from post_server.db.database import Database
    from post_server.settings import Settings
    from post_server.storage.blob_store import BlobStore


@contextmanager
def services() -> Iterator[tuple[Settings, Database, BlobStore]]:
    """The settings, the database with an up-to-date schema, and the blob store.

    Raises:
        Unavailable: the database can't be used, or not now.
    """
    from sqlalchemy.exc import OperationalError

    from post_server.db.database import Database
    from post_server.serve.preflight import away, migrate
    from post_server.settings import get_settings
    from post_server.storage.blob_store import BlobStore

    settings = get_settings()
    migrate(settings)
    database = Database.from_settings(settings)
    try:
        yield settings, database, BlobStore.from_settings(settings)
    except OperationalError as error:
        raise away(settings, error) from error
    finally:
        database.dispose()


def when(at: datetime | None) -> str:
    """A time in UTC, for a table; empty for None."""
    return f"{at:%Y-%m-%d %H:%M}" if at else ""
