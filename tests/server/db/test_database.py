"""The schema, the migrations, and guarantees that hold for every database."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import event, inspect, text
from sqlalchemy.exc import IntegrityError, StatementError

from post_server.auth.keys import authenticate, create_key, key_document, list_keys, revoke_key
from post_server.db.database import Database, alembic_config, guard
from post_server.db.tables import ApiKeyRow, Base, JobRow
from post_shared.errors import NotFound, Unauthenticated, Unavailable
from post_shared.schemas.common import Role
from post_shared.schemas.jobs import JobKind
from tests.server.backing import Backing


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path, backing: Backing) -> str:
    """The URL of an empty database."""
    return request.getfixturevalue("postgres").new_database() if backing.urls else f"sqlite:///{tmp_path}/new/post.db"


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    database.migrate()
    yield database
    database.dispose()


def test_migrations_give_the_schema_of_the_tables(database: Database) -> None:
    with database.engine.begin() as connection:
        command.check(alembic_config(connection))
        assert set(inspect(connection).get_table_names()) == {*Base.metadata.tables, "alembic_version"}


def test_migrating_again_changes_nothing_and_a_downgrade_leaves_nothing(database: Database) -> None:
    database.migrate()
    with database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
    database.migrate()


def test_several_processes_may_migrate_at_the_same_time(url: str) -> None:
    problems: list[Exception] = []

    def migrate() -> None:
        try:
            database = Database(url)
            database.migrate()
            database.dispose()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=migrate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_sqlite_is_durable_and_checks_references(tmp_path: Path) -> None:
    with Database(f"sqlite:///{tmp_path}/post.db").read() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA foreign_keys")) == 1


def test_switching_to_wal_waits_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "post.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE t (x)")
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.5, lambda: other.execute("COMMIT")).start()
    with Database(f"sqlite:///{path}").read() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
    other.close()


def test_the_database_of_a_newer_version_is_not_touched(database: Database) -> None:
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(Unavailable, match="newer version of POST"):
        database.migrate()


def test_migrating_an_up_to_date_schema_waits_for_no_writer(database: Database) -> None:
    with database.write() as session:
        guard(session)
        session.execute(text("UPDATE alembic_version SET version_num = version_num"))
        Database(database.engine.url.render_as_string(hide_password=False)).migrate()


def test_connections_are_reused(database: Database) -> None:
    opened: list[object] = []
    event.listen(database.engine, "connect", lambda connection, _: opened.append(connection))
    database.dispose()
    for _ in range(2):
        with ExitStack() as stack:
            for _ in range(8):
                stack.enter_context(database.read()).execute(text("SELECT 1"))
    assert len(opened) == 8


def test_references_are_checked(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(JobRow(kind=JobKind.DISTIL, request={}, owner_key_id="key_of_nobody"))


def test_times_are_returned_timezone_aware_in_utc(database: Database) -> None:
    east = datetime(2026, 1, 2, 3, 4, 5, 678901, timezone(timedelta(hours=5)))
    with database.write() as session:
        row, _ = create_key(session, name="x", role=Role.OWNER)
        row.created_at = east
    with database.read() as session:
        created_at = session.get_one(ApiKeyRow, row.id).created_at
    assert created_at == east
    assert created_at.tzinfo is UTC
    with pytest.raises(StatementError), database.write() as session:
        session.add(ApiKeyRow(name="y", role=Role.OWNER, key_hash="0", created_at=datetime(2026, 1, 1)))


def test_reading_sees_one_snapshot(database: Database) -> None:
    with database.read() as session:
        assert list_keys(session) == []
        with database.write() as other:
            create_key(other, name="late", role=Role.OWNER)
        assert list_keys(session) == []
    with database.read() as session:
        assert [row.name for row in list_keys(session)] == ["late"]


def test_guarded_writers_wait_for_each_other(database: Database) -> None:
    """Read, then write, from many threads: no update is lost, and no thread gets a locked database."""
    with database.write() as session:
        row, _ = create_key(session, name="0", role=Role.OWNER)

    def count() -> None:
        for _ in range(5):
            with database.write() as session:
                guard(session)
                same = session.get_one(ApiKeyRow, row.id)
                same.name = str(int(same.name) + 1)

    threads = [threading.Thread(target=count) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        assert session.get_one(ApiKeyRow, row.id).name == "30"


def test_a_failed_block_writes_nothing(database: Database) -> None:
    def fail() -> None:
        with database.write() as session:
            create_key(session, name="x", role=Role.OWNER)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with database.read() as session:
        assert list_keys(session) == []


class TestKeys:
    def test_only_the_hash_is_stored(self, database: Database) -> None:
        with database.write() as session:
            row, key = create_key(session, name="alice", role=Role.OWNER)
        with database.read() as session:
            stored = repr(session.execute(ApiKeyRow.__table__.select()).all()).encode()
        database.dispose()
        if path := database.engine.url.database if database.engine.dialect.name == "sqlite" else None:
            stored += b"".join(file.read_bytes() for file in Path(path).parent.iterdir())
        assert row.key_hash.encode() in stored
        assert key.startswith("post_")
        assert len(key) >= 48
        assert key.encode() not in stored
        assert key not in key_document(row).model_dump_json()

    def test_a_key_is_valid_until_it_is_revoked(self, database: Database) -> None:
        with database.write() as session:
            row, key = create_key(session, name="alice", role=Role.OWNER)
            assert authenticate(session, key).id == row.id
            for wrong in ("", "post_", key[:-1], key + "x", key.upper(), row.key_hash, "\ud800"):
                with pytest.raises(Unauthenticated):
                    authenticate(session, wrong)
            revoke_key(session, "alice")
            with pytest.raises(Unauthenticated):
                authenticate(session, key)

    def test_revoking_needs_an_unambiguous_reference(self, database: Database) -> None:
        with database.write() as session:
            first, _ = create_key(session, name="twin", role=Role.OWNER)
            create_key(session, name="twin", role=Role.OWNER)
            with pytest.raises(NotFound):
                revoke_key(session, "twin")
            with pytest.raises(NotFound):
                revoke_key(session, "nobody")
            assert revoke_key(session, first.id).revoked_at is not None
            assert [row.name for row in list_keys(session)] == ["twin", "twin"]
