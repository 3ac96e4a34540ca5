"""Database access: SQLite on one machine, PostgreSQL beyond it, with the same code."""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, QueuePool, create_engine, event, make_url, text
from sqlalchemy.exc import TimeoutError as DatabaseTimeout
from sqlalchemy.orm import Session, sessionmaker
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from post_server.settings import Settings
from post_shared.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")

_BUSY_MILLISECONDS = 30_000
_TIMEOUT_SECONDS = 30.0
"""How long a request waits for a connection or for a query."""
_CONNECTIONS = 15
"""Maximum per process. Connections stay open, because opening one takes longer than most requests."""
_READERS, _REMOTE_READERS = 2, 8
"""Threads of :meth:`Database.run_read`. SQLite answers at once: more threads would only contend for the interpreter and
double the processor time. A remote database answers several queries at the same time."""
_GUARD_LOCK = 0x504F5354  # an arbitrary constant: PostgreSQL's advisory lock for :func:`guard`
_MIGRATION_LOCK, _CLAIM_LOCK = _GUARD_LOCK + 1, _GUARD_LOCK + 2
_POSTGRES_OPTIONS: dict[str, str | int] = {
    # A server that disappears is noticed within the lease, not after TCP's default of 15 minutes.
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


class Database:
    """An engine and two kinds of sessions.

    :meth:`read` sees one snapshot and never waits for writers. :meth:`write` is one transaction: it
    commits when the block ends and rolls back when it raises. On SQLite it takes the write lock at its
    first statement, so it waits instead of failing half-way; do slow work (files, models) before that
    statement. PostgreSQL allows concurrent writers; :func:`guard` serialises them there too.
    """

    def __init__(self, url: str) -> None:
        self.engine = _create_engine(url)
        local = self.engine.dialect.name == "sqlite"
        snapshot = {} if local else {"isolation_level": "REPEATABLE READ"}
        self._read = sessionmaker(self.engine.execution_options(**snapshot), expire_on_commit=False)
        self._write = sessionmaker(self.engine.execution_options(immediate=True), expire_on_commit=False)
        self._readers = ThreadPoolExecutor(_READERS if local else _REMOTE_READERS, thread_name_prefix="records")

    @classmethod
    def from_settings(cls, settings: Settings) -> Database:
        """The database of the settings."""
        return cls(settings.database_url)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A read-only session; nothing is committed."""
        with self._read() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction; its rows stay usable afterwards."""
        with self._write.begin() as session:
            yield session

    async def run_read(self, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function that reads the database in a small thread pool, so that the event loop isn't blocked.

        Only for functions that wait for nothing but the database: others would block all readers.

        Raises:
            TimeoutError: SQLAlchemy's, as when no connection is available: the database hangs.
        """
        context, loop = copy_context(), asyncio.get_running_loop()
        result = loop.run_in_executor(self._readers, lambda: context.run(read, *args, **kwargs))
        try:
            return await asyncio.wait_for(result, _TIMEOUT_SECONDS)
        except TimeoutError:
            raise DatabaseTimeout("the database doesn't answer") from None

    def migrate(self) -> None:
        """Bring the schema up to date. Safe to call from several processes at once; waits for no writer if up to date.

        Raises:
            Unavailable: a newer version of POST has changed the schema.
        """
        from alembic import command
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory

        scripts = ScriptDirectory.from_config(alembic_config())
        with self.engine.connect() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        if current == scripts.get_current_head():
            return
        if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
            raise Unavailable(f"the database belongs to a newer version of POST (schema {current}); use that version")
        with self.engine.execution_options(immediate=True).begin() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            command.upgrade(alembic_config(connection), "head")

    def dispose(self) -> None:
        """Close all connections."""
        self._readers.shutdown(wait=False, cancel_futures=True)  # a hanging database must not block us
        self.engine.dispose()


def guard(session: Session) -> None:
    """Block other guarded writers until this transaction ends, so that what it reads stays true while it writes.

    Without it, deleting an unused blob could race with a new row that refers to the same bytes, and two requests
    could both find the name of their student free.
    """
    _lock(session, _GUARD_LOCK)


def guard_claims(session: Session) -> None:
    """Block other workers that claim a job. Not :func:`guard`: workers mustn't wait for an upload."""
    _lock(session, _CLAIM_LOCK)


def _lock(session: Session, key: int) -> None:
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
    else:  # in a writing session any statement takes SQLite's write lock
        session.execute(text("SELECT 1"))


def alembic_config(connection: Connection | None = None) -> Any:
    """Alembic's configuration without an ini file: the migrations are part of the package."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def to_json(value: Any) -> str:
    """JSON for a column; NaN and infinities, which JSON lacks, become null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _create_engine(url: str) -> Engine:
    parsed = make_url(url)
    common: dict[str, Any] = {"json_serializer": to_json, "hide_parameters": True}
    common |= {"poolclass": QueuePool, "pool_size": _CONNECTIONS, "max_overflow": 0}
    common |= {"pool_timeout": _TIMEOUT_SECONDS}
    if parsed.get_backend_name() != "sqlite":
        options = {name: value for name, value in _POSTGRES_OPTIONS.items() if name not in parsed.query}
        return create_engine(parsed, pool_pre_ping=True, connect_args=options, **common)
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = create_engine(parsed, connect_args={"timeout": _BUSY_MILLISECONDS / 1000}, **common)
    event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "begin", _begin)
    return engine


def _set_pragmas(connection: Any, _record: object) -> None:
    """Write-ahead log (readers beside one writer), foreign keys checked, and waiting for the lock."""
    connection.isolation_level = None  # the driver must not begin transactions itself; see _begin
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_MILLISECONDS}")
    _write_ahead(cursor)
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


@retry(
    retry=retry_if_exception_type(sqlite3.OperationalError),
    stop=stop_after_delay(_BUSY_MILLISECONDS / 1000),
    wait=wait_fixed(0.05),
    reraise=True,
)
def _write_ahead(cursor: sqlite3.Cursor) -> None:
    """Switch a new file once. SQLite doesn't wait for the lock here, whatever its timeout, hence the retries."""
    if cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        cursor.execute("PRAGMA journal_mode = WAL")


def _begin(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
