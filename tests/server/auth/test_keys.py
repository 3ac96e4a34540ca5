"""The life of an API key (created, used, rotated, expired, revoked) and the effect of its scopes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from post_client import Client
from post_server.auth.keys import (
    authenticate,
    check_still_valid,
    create_key,
    key_document,
    note_use,
    revoke_key,
    rotate_key,
    use_is_due,
)
from post_server.db.database import Database
from post_server.db.tables import ApiKeyRow, now
from post_shared.errors import InvalidInput, KeyExpired, Unauthenticated
from post_shared.schemas.common import Role
from post_shared.schemas.keys import SCOPES, Scope
from post_shared.schemas.predictions import Prediction, Predictions
from tests.server.http_harness import TASK, HttpHarness, code

DAY = timedelta(days=1)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    database = Database(f"sqlite:///{tmp_path}/post.db")
    database.migrate()
    with database.write() as session:
        yield session


def age(session: Session, row: ApiKeyRow, time: timedelta) -> None:
    """Make the key older by ``time``."""
    for name in ("created_at", "expires_at", "rotated_at", "previous_until", "last_used_at"):
        if (at := getattr(row, name)) is not None:
            setattr(row, name, at - time)
    session.flush()


def test_a_key_expires(session: Session) -> None:
    row, text = create_key(session, name="alice", role=Role.OWNER, expires_days=30)
    age(session, row, 29 * DAY)
    assert authenticate(session, text) is row
    age(session, row, DAY)
    with pytest.raises(KeyExpired, match="post key rotate"):
        authenticate(session, text)
    with pytest.raises(KeyExpired):
        check_still_valid(session, row.id)
    revoke_key(session, row.id)
    with pytest.raises(Unauthenticated) as refused:
        authenticate(session, text)
    assert type(refused.value) is Unauthenticated, "a revoked key is treated as unknown"


def test_a_rotated_key_is_the_same_key_with_another_text(session: Session) -> None:
    row, old = create_key(session, name="alice", role=Role.OWNER)
    same, new = rotate_key(session, "alice", grace_hours=24)
    assert same.id == row.id
    assert new != old
    assert authenticate(session, old) is authenticate(session, new)
    age(session, row, DAY)
    with pytest.raises(KeyExpired):
        authenticate(session, old)
    assert authenticate(session, new) is row


def test_only_the_previous_text_has_a_grace_time(session: Session) -> None:
    row, first = create_key(session, name="alice", role=Role.OWNER)
    _, second = rotate_key(session, row.id, grace_hours=24)
    _, third = rotate_key(session, row.id, grace_hours=0)
    for text in (first, second):
        with pytest.raises(Unauthenticated):
            authenticate(session, text)
    assert authenticate(session, third) is row
    revoke_key(session, row.id)
    with pytest.raises(Unauthenticated):
        authenticate(session, third)


def test_a_rotation_extends_no_text_and_renews_the_keys_lifetime(session: Session) -> None:
    row, old = create_key(session, name="alice", role=Role.OWNER, expires_days=10)
    age(session, row, 9.5 * DAY)
    _, new = rotate_key(session, row.id, grace_hours=24)
    assert row.expires_at is not None
    assert abs(row.expires_at - now() - 10 * DAY) < timedelta(minutes=5)
    age(session, row, 0.6 * DAY)
    with pytest.raises(KeyExpired):
        authenticate(session, old)
    age(session, row, 9.5 * DAY)
    with pytest.raises(KeyExpired):
        authenticate(session, new)
    _, newest = rotate_key(session, row.id, grace_hours=24, expires_days=1)
    with pytest.raises(KeyExpired):
        authenticate(session, new)
    assert authenticate(session, newest) is row


def test_a_key_has_its_own_scopes_or_those_of_its_role(session: Session) -> None:
    for role in Role:
        row, _ = create_key(session, name=role, role=role)
        assert tuple(key_document(row).scopes) == SCOPES[role]
    row, _ = create_key(session, name="few", role=Role.OWNER, scopes=[Scope.PREDICT, Scope.READ])
    assert key_document(row).scopes == [Scope.READ, Scope.PREDICT]
    with pytest.raises(InvalidInput, match="provide"):
        create_key(session, name="much", role=Role.OWNER, scopes=[Scope.PROVIDE])
    row.scopes = ["provide", "read", "of a later version"]
    assert key_document(row).scopes == [Scope.READ], "a scope never exceeds the key's role"


def test_the_last_use_is_written_once_a_minute(session: Session) -> None:
    row, _ = create_key(session, name="alice", role=Role.OWNER)
    assert use_is_due(row)
    note_use(session, row.id)
    session.refresh(row)
    first = row.last_used_at
    assert not use_is_due(row)
    note_use(session, row.id)
    session.refresh(row)
    assert row.last_used_at == first
    age(session, row, timedelta(seconds=61))
    assert use_is_due(row)
    note_use(session, row.id)
    session.refresh(row)
    assert row.last_used_at is not None
    assert first is not None
    assert row.last_used_at > first


# --- over HTTP ----------------------------------------------------------------------------------------


def add_key(http_harness: HttpHarness, name: str, role: Role, scopes: list[Scope]) -> None:
    with http_harness.database.write() as session:
        http_harness.add_caller(name, *create_key(session, name=name, role=role, scopes=scopes))


def operations(http_harness: HttpHarness) -> Iterator[tuple[str, str, list[str]]]:
    """Every operation under /v1 with its documented scopes."""
    for path, methods in http_harness.app.openapi()["paths"].items():
        if path.startswith("/v1/"):
            for method, operation in methods.items():
                ((_, scopes),) = operation["security"][0].items()
                yield method.upper(), re.sub(r"{\w+}", "x", path), scopes


@pytest.mark.parametrize("scope", list(Scope))
def test_an_operation_needs_its_documented_scopes(http_harness: HttpHarness, scope: Scope) -> None:
    """A key that lacks one scope is refused exactly by the operations that need it."""
    add_key(http_harness, "lacking", Role.PROVIDER, [other for other in Scope if other is not scope])
    refusals = 0
    for method, path, scopes in operations(http_harness):
        answer = http_harness("lacking", method, path)
        refused = answer.status_code == 403
        assert refused == (scope in scopes), (method, path, answer.text)
        refusals += refused
    assert refusals or scope is Scope.SCORES


def test_every_operation_except_cancelling_has_a_scope(http_harness: HttpHarness) -> None:
    """Cancelling needs the scope that created the job."""
    without = [(method, path) for method, path, scopes in operations(http_harness) if not scopes]
    assert without == [("POST", "/v1/jobs/x/cancel")]


def test_a_job_is_cancelled_with_the_scope_that_creates_it(http_harness: HttpHarness) -> None:
    target, _ = http_harness.add_pair()
    http_harness.add_dataset("corpus", b"prose\n", "corpus")
    request = {"target": target.id, "name": "new", "corpus": ["corpus"], "keep_layers": 2, "steps": 1}
    job_id = http_harness("provider", "POST", "/v1/distillations", json=request).json()["id"]
    add_key(http_harness, "mover", Role.PROVIDER, [Scope.READ, Scope.TRANSFER])
    add_key(http_harness, "maker", Role.PROVIDER, [Scope.PROVIDE])
    assert code(http_harness("mover", "POST", f"/v1/jobs/{job_id}/cancel")) == (403, "forbidden")
    assert http_harness("maker", "POST", f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelled"


@pytest.mark.parametrize("scopes", [[Scope.PREDICT], [Scope.PREDICT, Scope.SCORES]])
def test_probabilities_need_their_scope(
    http_harness: HttpHarness, monkeypatch: pytest.MonkeyPatch, scopes: list[Scope]
) -> None:
    """The predictor is another process with its own tests; its response is faked here."""
    target, _ = http_harness.add_pair()
    add_key(http_harness, "caller", Role.OWNER, scopes)

    async def answer(*_: Any, **__: Any) -> dict[str, Any]:
        item = Prediction(label="positive", scores={"positive": 0.9, "negative": 0.1})
        return Predictions(model_id=target.id, prompt_id=None, items=[item]).model_dump(mode="json")

    monkeypatch.setattr("post_server.predictions.queue_client.request", answer)
    body = {"model": target.id, "task": TASK.model_dump(), "texts": ["fine"]}
    (item,) = http_harness("caller", "POST", "/v1/predictions", json=body).json()["items"]
    assert item["label"] == "positive"
    assert bool(item["scores"]) == (Scope.SCORES in scopes)


def test_a_call_updates_the_last_use_and_an_expired_key_is_refused_as_expired(http_harness: HttpHarness) -> None:
    http_harness("alice", "GET", "/v1/models")
    key_id = http_harness.key_ids["alice"]
    with http_harness.database.write() as session:
        assert session.get_one(ApiKeyRow, key_id).last_used_at is not None
        assert session.get_one(ApiKeyRow, http_harness.key_ids["bob"]).last_used_at is None
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == key_id).values(expires_at=now()))
    answer = http_harness("alice", "GET", "/v1/models")
    assert code(answer) == (401, "key_expired")
    assert answer.headers["www-authenticate"] == "Bearer"
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"]) as client, pytest.raises(KeyExpired):
        list(client.models.list())
