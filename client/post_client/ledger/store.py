"""The ledger's SQLite file: one transaction per query or change, on disk before anything is trained."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from platformdirs import user_data_path

from post_shared.errors import LedgerInvalid

LEDGER_VARIABLE = "POST_LEDGER"
APPLICATION, VERSION = 0x504F5354, 2
WAIT_SECONDS = 60.0
"""How long to wait for another process's transaction, which may compute a composition."""

SCHEMA = """
CREATE TABLE salt (value BLOB NOT NULL);
CREATE TABLE data_sets (
    id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, unit TEXT NOT NULL, name TEXT NOT NULL,
    rows INTEGER NOT NULL, units INTEGER NOT NULL, cap REAL, normalization INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE records (
    data_set INTEGER NOT NULL REFERENCES data_sets, unit BLOB NOT NULL, row BLOB NOT NULL,
    PRIMARY KEY (data_set, unit, row)
) WITHOUT ROWID;
CREATE INDEX records_by_unit ON records (unit);
CREATE INDEX records_by_row ON records (row);
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, data_set INTEGER NOT NULL REFERENCES data_sets, work BLOB NOT NULL, key BLOB,
    unit TEXT NOT NULL, delta REAL NOT NULL, noise_multiplier REAL, rate REAL, steps INTEGER,
    started TEXT NOT NULL, ended TEXT
);
"""
"""``runs.noise_multiplier`` is NULL without differential privacy; ``key`` is NULL once the run is finished.
``data_sets.normalization`` is the version of :func:`post_client.privacy.text_identity.normalized` in its hashes."""
MIGRATIONS = {1: "ALTER TABLE data_sets ADD COLUMN normalization INTEGER NOT NULL DEFAULT 0"}
"""What leads from a version to the next."""


def default_path() -> Path:
    """``POST_LEDGER``, or a file in the platform's folder for user data."""
    from_environment = os.environ.get(LEDGER_VARIABLE)
    return Path(from_environment) if from_environment else user_data_path("post") / "ledger.db"


class Store:
    """The open file. Every SQLite error becomes a :class:`LedgerInvalid` with the file's path."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # two paths of one file must share a run's lock
        with self._translated_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # only its owner may read it
            self._connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
            try:
                self._connection.execute("PRAGMA foreign_keys = ON")
                self._connection.execute("PRAGMA synchronous = EXTRA")  # a charge survives a power cut
                self._connection.execute("PRAGMA secure_delete = ON")  # a destroyed key is overwritten
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """An exclusive transaction, rolled back on an error.

        Raises:
            LedgerInvalid: the file can't be read or written (a full disk, a lost mount, no permission).
        """
        with self._translated_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                if self._connection.in_transaction:
                    self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite may have rolled back already
                    self._connection.execute("ROLLBACK")
                raise

    def salt(self) -> bytes:
        with self._translated_errors():
            return bytes(self._connection.execute("SELECT value FROM salt").fetchone()[0])

    def _prepare(self) -> None:
        if self._pragma("user_version") == 0 and not self._tables():
            with self.transaction() as connection:
                if not self._tables():  # another process may have been first
                    for statement in SCHEMA.split(";")[:-1]:
                        connection.execute(statement)
                    connection.execute("INSERT INTO salt VALUES (?)", (os.urandom(32),))
                    connection.execute(f"PRAGMA application_id = {APPLICATION}")
                    connection.execute(f"PRAGMA user_version = {VERSION}")
        if self._pragma("application_id") == APPLICATION and self._pragma("user_version") in MIGRATIONS:
            with self.transaction() as connection:
                while (version := self._pragma("user_version")) in MIGRATIONS:  # another process may have been first
                    connection.execute(MIGRATIONS[version])
                    connection.execute(f"PRAGMA user_version = {version + 1}")
        if (self._pragma("application_id"), self._pragma("user_version")) != (APPLICATION, VERSION):
            raise LedgerInvalid(f"{self.path} isn't a ledger of this version; use another file, or update POST")
        if self._connection.execute("SELECT value FROM salt").fetchone() is None:
            raise LedgerInvalid(
                f"{self.path} is damaged: without its salt it can't recognise any rows; restore a backup"
            )

    def _tables(self) -> bool:
        return bool(self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])

    def _pragma(self, name: str) -> Any:
        return self._connection.execute(f"PRAGMA {name}").fetchone()[0]

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LedgerInvalid(f"{self.path}: can't create or open the ledger: {error.strerror or error}") from error
        except sqlite3.Error as error:
            raise LedgerInvalid(
                f"{self.path}: the ledger can't be read or written: {error}. Runs that can't be charged are not "
                f"started; {_remedy(error)}"
            ) from error


def _remedy(error: sqlite3.Error) -> str:
    """What the user can do about an SQLite error."""
    code = getattr(error, "sqlite_errorcode", None)
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return "the file isn't a ledger or is damaged: restore a backup, or use another file"
    if code == sqlite3.SQLITE_FULL:
        return "free disk space, or use another file"
    return "fix the cause, or use another file"
