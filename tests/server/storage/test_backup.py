"""The commands of the backup guide, run on the embedded services: a restore has everything that was saved."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError

from post_server.auth.audit_log import lines
from post_server.db.database import Database
from post_server.db.tables import JobRow
from post_server.jobs import states
from post_server.storage.blob_store import BlobStore
from post_shared.schemas.jobs import JobKind
from tests.server.backing import Backing
from tests.server.http_harness import HttpHarness, prompt_bytes

GUIDE = (Path(__file__).parents[3] / "docs" / "howto-operate.md").read_text("utf-8")


def commands(marker: str) -> str:
    """The code block after a marker in the guide."""
    match = re.search(rf"<!-- {marker} -->\n```\n(.*?)```", GUIDE, re.DOTALL)
    assert match is not None, marker
    return match[1]


def shell(script: str, home: Path, backup: Path, database: str = "") -> subprocess.CompletedProcess[str]:
    """Run it in a shell, with ``post`` on the path."""
    folder = str(Path(sys.executable).parent)
    variables = {
        "DATABASE": database.replace("+psycopg", ""),
        "POST_HOME": str(home),
        "BACKUP": str(backup),
        "PATH": f"{folder}:{os.environ['PATH']}",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POST_")} | variables
    return subprocess.run(["bash", "-euc", script], capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture
def filled(home: Path) -> HttpHarness:
    http_harness = HttpHarness(home / "provider")
    _, student = http_harness.add_pair()
    http_harness.add_dataset()
    http_harness.push("alice", prompt_bytes(student.hash))
    row = JobRow(kind=JobKind.TRANSFER, request={}, owner_key_id=http_harness.key_ids["alice"])
    with http_harness.database.write() as session:
        states.announce(session, row)
    return http_harness


def rows_of(url: str) -> dict[str, list[str]]:
    """All rows of all tables."""
    database = Database(url)
    with database.read() as session:
        names = inspect(session.connection()).get_table_names()
        rows = {name: sorted(map(repr, session.execute(text(f"SELECT * FROM {name}")))) for name in names}
    database.dispose()
    return rows


def everything(home: Path) -> dict[str, list[str]]:
    """All rows of all tables, and the names of all blobs, whose bytes are checked."""
    rows = rows_of(f"sqlite:///{home}/post.db")
    store = BlobStore(f"file://{home}/blobs")
    assert all(store.read(sha256) for sha256 in store.list())
    assert len(rows["jobs"]) == 1
    return rows | {"blobs": store.list()}


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="the guide's sqlite3 isn't installed")
def test_a_backup_of_a_running_server_restores_all_of_it(filled: HttpHarness, home: Path) -> None:
    backup = home / "backup"
    done = shell(commands("backup"), filled.settings.home, backup)  # the server runs meanwhile
    assert done.returncode == 0, done.stderr
    saved = everything(filled.settings.home)
    student = filled("alice", "GET", "/v1/models?role=student").json()["items"][0]
    filled.push("alice", prompt_bytes(student["hash"], seed=9))  # after the backup, so not part of it
    filled.close()
    shutil.rmtree(filled.settings.home)
    done = shell(commands("restore"), filled.settings.home, backup)
    assert done.returncode == 0, done.stderr
    assert "every blob exists" in done.stderr
    assert everything(filled.settings.home) == saved
    http_harness = HttpHarness(filled.settings.home)  # it serves with the old keys
    http_harness.keys["alice"] = filled.keys["alice"]
    http_harness.add_caller("saved", alices_key(http_harness), filled.keys["alice"])
    (prompt,) = http_harness("saved", "GET", "/v1/prompts").json()["items"]
    assert http_harness("saved", "GET", f"/v1/prompts/{prompt['id']}/file").content == prompt_bytes(student["hash"])
    with http_harness.database.read() as session:
        assert [line.action for line in lines(session)][-1] == "dataset.add", "the audit log is restored too"
    http_harness.close()


def alices_key(http_harness: HttpHarness) -> object:
    from post_server.auth.keys import authenticate

    with http_harness.database.read() as session:
        return authenticate(session, http_harness.keys["alice"])


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="the guide's sqlite3 isn't installed")
def test_a_damaged_restore_is_detected(filled: HttpHarness, home: Path) -> None:
    """A missing blob, and one whose bytes have changed."""
    filled.close()
    lost, changed = filled.store.list()[:2]
    filled.store.delete(lost)
    path = filled.store.local_path(changed)
    path.chmod(0o600)
    path.write_bytes(b"x")
    done = shell("post admin check --hashes", filled.settings.home, home / "backup")
    assert done.returncode == 1
    assert sorted(done.stdout.splitlines()) == sorted([f"{lost} is missing", f"{changed} holds other bytes"])


def test_a_dump_of_postgresql_restores_all_rows_and_triggers(
    request: pytest.FixtureRequest, http_harness: HttpHarness, home: Path, backing: Backing
) -> None:
    """The audit log stays append-only."""
    if not backing.urls:
        pytest.skip("needs --backing real")
    _, student = http_harness.add_pair()
    http_harness.push("alice", prompt_bytes(student.hash))
    url, new = http_harness.settings.database_url, request.getfixturevalue("postgres").new_database()
    for kind, database in (("backup", url), ("restore", new)):
        done = shell(commands(f"{kind} of PostgreSQL"), home, home, database)
        assert done.returncode == 0, done.stderr
    assert rows_of(new) == rows_of(url)
    assert rows_of(new)["audit_log"]
    restored = Database(new)
    restored.migrate()
    with pytest.raises(DBAPIError, match="append-only"), restored.write() as session:
        session.execute(text("DELETE FROM audit_log"))
    restored.dispose()
