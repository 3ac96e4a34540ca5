"""Prediction requests: who may use which model and prompt, and what happens without a predictor."""

from __future__ import annotations

from typing import Any

import pytest

from post_server.db.tables import ModelRow
from post_server.prompts.service import add_prompt
from post_shared.schemas.prompts import PromptRole
from tests.server.http_harness import TASK, WIDTH, HttpHarness, code, prompt_bytes

BODY = {"model": "large", "task": TASK.model_dump(), "texts": ["a fine film"]}


@pytest.fixture
def student(http_harness: HttpHarness) -> ModelRow:
    return http_harness.add_pair()[1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": "none"}, (404, "not_found")),
        ({"model": "small"}, (404, "not_found")),  # owners run students themselves
        ({"prompt": "prm_none", "task": None}, (404, "not_found")),
        ({"task": None}, (422, "invalid_input")),
        ({"task": {"template": "no slot"}}, (422, "task_invalid")),
        ({"texts": []}, (422, "invalid_input")),
        ({"texts": [""]}, (422, "invalid_input")),
        ({"texts": ["x"] * 257}, (422, "invalid_input")),
        ({"texts": ["x" * 20_001]}, (422, "invalid_input")),
        ({"max_new_tokens": 0}, (422, "invalid_input")),
    ],
)
def test_invalid_requests_are_refused(
    http_harness: HttpHarness, student: ModelRow, change: dict[str, Any], expected: tuple[int, str]
) -> None:
    assert code(http_harness("alice", "POST", "/v1/predictions", json={**BODY, **change})) == expected


def test_a_prompt_has_its_own_task(http_harness: HttpHarness, student: ModelRow) -> None:
    prompt = http_harness.push("alice", prompt_bytes(student.hash)).json()["id"]
    assert code(http_harness("alice", "POST", "/v1/predictions", json={**BODY, "prompt": prompt})) == (
        422,
        "invalid_input",
    )


def test_nobody_uses_the_prompt_of_another(http_harness: HttpHarness, student: ModelRow) -> None:
    prompt = http_harness.push("alice", prompt_bytes(student.hash)).json()["id"]
    body = {**BODY, "prompt": prompt, "task": None}
    assert code(http_harness("bob", "POST", "/v1/predictions", json=body)) == (404, "not_found")
    assert code(http_harness("alice", "POST", "/v1/predictions", json=body)) == (
        503,
        "unavailable",
    )  # no predictor is running


def test_a_target_prompt_belongs_to_its_model(http_harness: HttpHarness, student: ModelRow) -> None:
    other = http_harness.add_model("other")
    data = prompt_bytes(other.hash, width=WIDTH)
    with http_harness.database.write() as session:
        row, _ = add_prompt(
            session, http_harness.store, data, role=PromptRole.TARGET, owner_key_id=http_harness.key_ids["alice"]
        )
    body = {**BODY, "prompt": row.id, "task": None}
    assert code(http_harness("alice", "POST", "/v1/predictions", json=body)) == (422, "prompt_mismatch")


def test_without_a_predictor_it_is_unavailable_immediately(http_harness: HttpHarness, student: ModelRow) -> None:
    answer = http_harness("alice", "POST", "/v1/predictions", json=BODY)
    assert code(answer) == (503, "unavailable")
    assert answer.headers["retry-after"]
