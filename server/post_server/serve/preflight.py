"""Checks the database and the broker before anything uses them; each error fits on one line.

A module of its own, since it is slow to import: the supervisor does so while its first children start.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import redis
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from post_server.db.database import Database
from post_server.serve.children import Child
from post_server.settings import Settings
from post_shared.errors import Unavailable

if TYPE_CHECKING:
    from post_server.serve.children import Stopping


def migrate(settings: Settings) -> None:
    """Bring the database schema up to date.

    Raises:
        Unavailable: the database can't be used.
    """
    try:
        make_url(settings.database_url)
    except ArgumentError as error:
        raise Unavailable(
            "POST_DATABASE_URL can't be parsed; it has the form postgresql+psycopg://user@host/name"
        ) from error
    try:
        database = Database.from_settings(settings)
        try:
            database.migrate()
        finally:
            database.dispose()
    except (NoSuchModuleError, ImportError) as error:
        raise Unavailable(f"no driver for the database {_shown(settings)}: {error}") from error
    except (SQLAlchemyError, OSError) as error:
        raise away(settings, error) from error


def away(settings: Settings, error: Exception) -> Unavailable:
    """The error that the database can't be used, with the first line of the reason."""
    reason = str(getattr(error, "orig", None) or error).splitlines()[0]
    return Unavailable(f"the database {_shown(settings)} can't be used: {reason}")


def _shown(settings: Settings) -> str:
    return make_url(settings.database_url).render_as_string(hide_password=True)


def await_redis(url: str, child: Child | None, stopping: Stopping) -> None:
    """Wait until the Redis server answers: the embedded one while it starts, another one for a few seconds.

    Raises:
        Unavailable: it doesn't answer.
    """
    deadline = time.monotonic() + (10.0 if child else 3.0)
    while not stopping:
        try:
            with redis.Redis.from_url(url, socket_connect_timeout=2.0, socket_timeout=2.0) as client:
                client.ping()
            return
        except (redis.RedisError, ValueError, OSError) as error:
            ended = child is not None and not child.alive
            if ended or time.monotonic() > deadline or isinstance(error, ValueError):
                hint = f"see {child.log}" if child else "check POST_REDIS_URL"
                raise Unavailable(f"the Redis server doesn't answer: {error}; {hint}") from error
        time.sleep(0.05)
