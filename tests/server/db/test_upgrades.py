"""A database of an earlier version, with rows in every table, is upgraded to this version without losing data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import Connection, inspect, text

from post_server.auth.keys import scopes_of
from post_server.db.database import Database, alembic_config
from post_server.db.tables import ApiKeyRow, JobEventRow, JobRow
from post_shared.schemas.common import Role
from post_shared.schemas.distillations import DistillationCreate
from post_shared.schemas.jobs import JobState
from post_shared.schemas.keys import SCOPES
from post_shared.schemas.reports import ReportCreate
from post_shared.schemas.transfers import TransferCreate
from tests.server.backing import Backing

AT = "2026-01-02 03:04:05.000000"
FIRST: dict[str, dict[str, Any]] = {
    "api_keys": {"id": "key_1", "name": "alice", "role": "owner", "key_hash": "a" * 64, "created_at": AT},
    "models": {
        "id": "mod_1",
        "name": "small",
        "role": "student",
        "hash": "b" * 64,
        "kind": "causal",
        "architecture": "Llama",
        "layers": 2,
        "hidden_size": 8,
        "vocabulary": 6,
        "parameters": 48,
        "size_bytes": 10,
        "files": "[]",
        "created_at": AT,
    },
    "datasets": {
        "id": "set_1",
        "name": "public",
        "kind": "rows",
        "rows": 1,
        "sha256": "c" * 64,
        "size_bytes": 3,
        "created_at": AT,
    },
    "prompts": {
        "id": "prm_1",
        "role": "source",
        "owner_key_id": "key_1",
        "model_id": "mod_1",
        "model_hash": "b" * 64,
        "length": 3,
        "width": 8,
        "task": '{"template": "{text}"}',
        "sha256": "d" * 64,
        "size_bytes": 4,
        "created_at": AT,
    },
    "jobs": {
        "id": "job_1",
        "kind": "transfer",
        "state": "queued",
        "request": "{}",
        "owner_key_id": "key_1",
        "attempt": 1,
        "progress": 0.5,
        "metrics": "{}",
        "created_at": AT,
    },
    "job_events": {"job_id": "job_1", "sequence": 1, "at": AT, "kind": "state", "data": '{"state": "queued"}'},
    "idempotency": {
        "key_id": "key_1",
        "key": "k",
        "body_hash": "e" * 64,
        "status": 202,
        "response": '{"json": "{}"}',
        "created_at": AT,
    },
}
"""A row for every table of revision 0001, referenced tables first."""


def fill(connection: Connection) -> None:
    for table, row in FIRST.items():
        names = ", ".join(row)
        connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({', '.join(f':{name}' for name in row)})"), row)


def contents(connection: Connection) -> dict[str, list[dict[str, Any]]]:
    """All rows, with the columns of revision 0001."""
    return {
        table: [dict(line) for line in connection.execute(text(f"SELECT {', '.join(row)} FROM {table}")).mappings()]
        for table, row in FIRST.items()
    }


@pytest.fixture
def old(request: pytest.FixtureRequest, tmp_path: Path, backing: Backing) -> Iterator[Database]:
    """A database of revision 0001 with rows in it."""
    url = request.getfixturevalue("postgres").new_database() if backing.urls else f"sqlite:///{tmp_path}/post.db"
    database = Database(url)
    with database.engine.begin() as connection:
        command.upgrade(alembic_config(connection), "0001")
        fill(connection)
        assert {*FIRST, "alembic_version"} == set(inspect(connection).get_table_names())
    yield database
    database.dispose()


def test_an_upgrade_keeps_every_row(old: Database) -> None:
    with old.engine.begin() as connection:
        before = contents(connection)
    old.migrate()
    with old.engine.begin() as connection:
        assert contents(connection) == before
        command.check(alembic_config(connection))


def test_old_rows_keep_their_meaning(old: Database) -> None:
    old.migrate()
    with old.read() as session:
        job = session.get_one(JobRow, "job_1")
        assert (job.state, job.queued_at, job.lease_losses) == (JobState.QUEUED, job.created_at, 0)
        assert session.get_one(JobEventRow, ("job_1", 1)).data == {"state": "queued"}
        key = session.get_one(ApiKeyRow, "key_1")
        assert key.role is Role.OWNER
        assert scopes_of(key) == SCOPES[Role.OWNER], "an old key may do what it could"
        assert (key.expires_at, key.previous_hash) == (None, None)


OLD_REQUESTS: dict[str, dict[str, Any]] = {
    "distil": {
        "target": "large", "name": "small", "corpus": ["prose"], "keep_layers": 4, "layer_pattern": "front",
        "start": "fold", "answer_forms": ["{text} It was"], "freeze_head": True, "steps": None, "minutes": 6.0,
        "plateau": False, "accumulate": None, "learning_rate": 0.001, "seed": 0,
    },
    "transfer": {"prompt": "prm_1", "target": "large", "dataset": "public", "alpha": 0.7, "start": "task", "steps": 9},
    "report": {
        "student": "small", "members": ["a"], "non_members": ["b"], "tune_rows": 1000, "steps": 200, "batch_size": 32,
        "learning_rate": 0.02, "length": 20, "max_length": 128, "seed": 0,
        "tasks": [{"dataset": "public", "task": {"template": "{text}", "label_words": {"a": ["x"], "b": ["y"]}}}],
    },
}  # fmt: skip
"""Job requests as revision 0007 stored them."""


@pytest.mark.parametrize("kind", OLD_REQUESTS)
def test_old_requests_are_read_with_the_new_names_and_restored(old: Database, kind: str) -> None:
    documents = {"distil": DistillationCreate, "transfer": TransferCreate, "report": ReportCreate}
    with old.engine.begin() as connection:
        command.upgrade(alembic_config(connection), "0007")
        values = {"kind": kind, "request": json.dumps(OLD_REQUESTS[kind]), "result": "null"}
        if kind == "report":
            values["result"] = json.dumps({"request": OLD_REQUESTS[kind]})
        connection.execute(text("UPDATE jobs SET kind = :kind, request = :request, result = :result"), values)
    old.migrate()
    with old.read() as session:
        job = session.get_one(JobRow, "job_1")
        read = documents[kind].model_validate(job.request)
        if kind == "report":
            assert job.result is not None
            assert documents[kind].model_validate(job.result["request"]) == read
    assert {"distil": "least_squares", "transfer": "instruction", "report": 20}[kind] in {
        getattr(read, "student_init", None),
        getattr(read, "prompt_init", None),
        getattr(getattr(read, "tuning", None), "num_virtual_tokens", None),
    }
    with old.engine.begin() as connection:
        command.downgrade(alembic_config(connection), "0007")
        stored = connection.execute(text("SELECT request FROM jobs")).scalar_one()
    assert (json.loads(stored) if isinstance(stored, str) else stored) == OLD_REQUESTS[kind]


def test_a_downgrade_keeps_every_row(old: Database) -> None:
    with old.engine.begin() as connection:
        before = contents(connection)
    old.migrate()
    with old.engine.begin() as connection:
        command.downgrade(alembic_config(connection), "0001")
        assert contents(connection) == before
