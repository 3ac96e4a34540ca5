"""Every change adds a line to the audit log, and no line can be updated or deleted."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from post_server.auth.audit_log import lines, record
from post_server.db.database import Database
from post_server.db.tables import AuditRow
from post_server.settings import Settings, get_settings
from tests.server.http_harness import HttpHarness, code, prompt_bytes
from tests.server.server_harness import ServerHarness
from tests.server.terminal import run


def all_lines(http_harness: HttpHarness) -> list[tuple[str, str, str]]:
    """All lines, oldest first."""
    with http_harness.database.read() as session:
        rows = session.scalars(select(AuditRow).order_by(AuditRow.id))
        return [(row.who, row.action, row.thing) for row in rows]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_log SET who = 'nobody'",
        "UPDATE audit_log SET id = id + 100",
        "DELETE FROM audit_log",
        "DELETE FROM audit_log WHERE who = 'key_1'",
    ],
)
def test_the_database_refuses_to_update_or_delete_a_line(server_harness: ServerHarness, statement: str) -> None:
    with server_harness.database.write() as session:
        record(session, "key_1", "prompt.push", "prm_1")
    with pytest.raises(DBAPIError, match="append-only"), server_harness.database.write() as session:
        session.execute(text(statement))
    with server_harness.database.read() as session:
        assert [row.who for row in lines(session)] == ["key_1"]


def test_the_database_refuses_to_replace_a_line(server_harness: ServerHarness) -> None:
    with server_harness.database.write() as session:
        record(session, "key_1", "prompt.push", "prm_1")
    if server_harness.database.engine.dialect.name == "sqlite":
        statement = "INSERT OR REPLACE INTO audit_log (id, at, who, action, thing) VALUES (1, '2026', 'x', 'x', 'x')"
    else:
        statement = "TRUNCATE audit_log"
    with pytest.raises(DBAPIError, match="append-only"), server_harness.database.write() as session:
        session.execute(text(statement))


def test_every_action_on_a_prompt_is_recorded(http_harness: HttpHarness) -> None:
    """Each action once, but no refusals, reads of metadata or repeated requests."""
    target, student = http_harness.add_pair()
    dataset = http_harness.add_dataset()
    data = prompt_bytes(student.hash)
    prompt = http_harness.push("alice", data).json()["id"]
    http_harness.push("alice", data)
    request = {"prompt": prompt, "target": target.id, "dataset": "public"}
    headers = {"Idempotency-Key": "once"}
    for _ in range(2):
        job = http_harness("alice", "POST", "/v1/transfers", json=request, headers=headers).json()["id"]
    http_harness("alice", "GET", f"/v1/prompts/{prompt}")
    assert code(http_harness("bob", "DELETE", f"/v1/prompts/{prompt}")) == (404, "not_found")
    http_harness("provider", "POST", f"/v1/jobs/{job}/cancel")
    http_harness("provider", "GET", f"/v1/prompts/{prompt}/file", headers={"Range": "bytes=1-"})
    http_harness("provider", "HEAD", f"/v1/prompts/{prompt}/file")
    http_harness("alice", "GET", f"/v1/models/{student.id}/files/config.json")
    http_harness("alice", "DELETE", f"/v1/prompts/{prompt}")
    alice, provider = http_harness.key_ids["alice"], http_harness.key_ids["provider"]
    assert all_lines(http_harness) == [
        (provider, "dataset.add", dataset),
        (alice, "prompt.push", prompt),
        (alice, "transfer.create", job),
        (provider, "job.cancel", job),
        (provider, "prompt.download", prompt),
        (alice, "model.download", student.id),
        (alice, "prompt.delete", prompt),
    ]


def test_a_line_has_its_request_id_and_shares_its_transaction(http_harness: HttpHarness) -> None:
    _, student = http_harness.add_pair()
    answer = http_harness.push("alice", prompt_bytes(student.hash))
    with http_harness.database.read() as session:
        (row,) = lines(session)
    assert row.request_id == answer.headers["x-request-id"]

    def fail() -> None:
        with http_harness.database.write() as session:
            record(session, "key_1", "prompt.delete", "prm_1")
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(all_lines(http_harness)) == 1


@pytest.fixture
def settings(home: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setenv("POST_HOME", str(home))
    get_settings.cache_clear()
    yield get_settings()
    get_settings.cache_clear()


def test_the_providers_commands_are_recorded_and_shown(settings: Settings) -> None:
    run("key", "create", "--role", "owner", "--name", "alice")
    run("key", "rotate", "alice")
    run("key", "limit", "alice", "--priority", "1")
    run("key", "revoke", "alice")
    shown = json.loads(run("admin", "audit", "--json"))
    assert [line["action"] for line in shown] == ["key.revoke", "key.limit", "key.rotate", "key.create"]
    assert all(line["who"].startswith("local:") for line in shown)
    assert len({line["thing"] for line in shown}) == 1
    key = shown[0]["thing"]
    with Database.from_settings(settings).write() as session:
        record(session, key, "prompt.push", "prm_1")
        record(session, key, "prompts_of_others", "prm_2")
    assert run("admin", "audit", "--action", "prompt", "--who", key).count("prm_") == 1
    assert "key.rotate" in run("admin", "audit", "--thing", key, "--days", "1")
    assert len(json.loads(run("admin", "audit", "--limit", "2", "--json"))) == 2
