"""Questions: who may ask whom with what, and what happens when nobody answers."""

from __future__ import annotations

from typing import Any

import pytest

from post_server.prompt_store import add_prompt
from post_server.records import ModelRow
from post_shared.schemas import PromptRole
from tests.server.front import TASK, WIDTH, Front, code, prompt_bytes

ASK = {"model": "large", "task": TASK.model_dump(), "texts": ["a fine film"]}


@pytest.fixture
def student(front: Front) -> ModelRow:
    return front.add_pair()[1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": "none"}, (404, "not_found")),
        ({"model": "small"}, (404, "not_found")),  # a student is the owner's to ask
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
def test_a_question_must_fit(
    front: Front, student: ModelRow, change: dict[str, Any], expected: tuple[int, str]
) -> None:
    assert code(front("alice", "POST", "/v1/predictions", json={**ASK, **change})) == expected


def test_a_prompt_carries_its_task(front: Front, student: ModelRow) -> None:
    prompt = front.push("alice", prompt_bytes(student.hash)).json()["id"]
    assert code(front("alice", "POST", "/v1/predictions", json={**ASK, "prompt": prompt})) == (422, "invalid_input")


def test_nobody_asks_through_anothers_prompt(front: Front, student: ModelRow) -> None:
    prompt = front.push("alice", prompt_bytes(student.hash)).json()["id"]
    question = {**ASK, "prompt": prompt, "task": None}
    assert code(front("bob", "POST", "/v1/predictions", json=question)) == (404, "not_found")
    assert code(front("alice", "POST", "/v1/predictions", json=question)) == (503, "unavailable")  # nobody answers


def test_a_target_prompt_belongs_to_its_model(front: Front, student: ModelRow) -> None:
    other = front.add_model("other")
    data = prompt_bytes(other.hash, width=WIDTH)
    with front.database.write() as session:
        row, _ = add_prompt(session, front.store, data, role=PromptRole.TARGET, owner_key_id=front.key_ids["alice"])
    question = {**ASK, "prompt": row.id, "task": None}
    assert code(front("alice", "POST", "/v1/predictions", json=question)) == (422, "prompt_mismatch")


def test_without_a_predictor_the_answer_says_so_at_once(front: Front, student: ModelRow) -> None:
    answer = front("alice", "POST", "/v1/predictions", json=ASK)
    assert code(answer) == (503, "unavailable")
    assert answer.headers["retry-after"]
