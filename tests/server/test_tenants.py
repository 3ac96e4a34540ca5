"""One owner's resources don't exist for another: every operation of the OpenAPI document, with another's ids.

The cases are compared with the document, so that a new endpoint without one fails here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import update

from post_server.auth.keys import create_key
from post_server.db.tables import JobRow
from post_server.jobs import states
from post_shared.schemas.common import Role
from tests.server.http_harness import ROWS, TASK, HttpHarness, code, prompt_bytes
from tests.server.operations import operations


@dataclass(frozen=True)
class Foreign:
    """Names a resource of alice that only she and the provider can see. ``{prompt}`` stands for its id."""

    body: dict[str, Any] | bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Listed:
    """A list, which contains nothing of alice for others."""


@dataclass(frozen=True)
class Providers:
    """Only a provider may; with ``own``, only the provider's key that created the resource."""

    body: dict[str, Any] | bytes | None = None
    own: bool = False


@dataclass(frozen=True)
class Shared:
    """Names nothing that belongs to an owner."""


Case = Foreign | Listed | Providers | Shared
CASES: dict[str, Case] = {
    "list_models": Shared(),
    "get_model": Shared(),
    "get_manifest": Shared(),
    "get_model_file": Shared(),
    "list_datasets": Shared(),
    "get_dataset": Shared(),
    "get_dataset_preview": Shared(),
    "create_dataset": Providers(ROWS),
    "list_uploads": Providers(),
    "create_upload": Providers({"name": "x", "kind": "rows"}),
    "get_upload": Providers(own=True),
    "put_upload_part": Providers(ROWS, own=True),
    "finish_upload": Providers({}, own=True),
    "remove_dataset_upload": Providers(own=True),
    "list_prompts": Listed(),
    "create_prompt": Shared(),
    "get_prompt": Foreign(),
    "get_prompt_file": Foreign(),
    "remove_prompt": Foreign(),
    "create_distillation": Providers(
        {"target": "large", "name": "tiny", "corpus": ["public"], "keep_layers": 2, "steps": 1}
    ),
    "create_transfer": Foreign({"prompt": "{prompt}", "target": "large", "dataset": "public"}),
    "create_evaluation": Foreign({"prompt": "{prompt}", "model": "small", "dataset": "public"}),
    "create_report": Providers(
        {
            "student": "small",
            "tasks": [{"dataset": "public", "task": TASK.model_dump()}],
            "members": ["public"],
            "non_members": ["public"],
        }
    ),
    "get_report": Providers(),
    "list_jobs": Listed(),
    "get_job": Foreign(),
    "cancel_job": Foreign(),
    "get_job_metrics": Foreign(),
    "get_job_events": Foreign(),
    "create_predictions": Foreign({"prompt": "{prompt}", "model": "large", "texts": ["x"]}),
    "create_completion": Foreign({"model": "large:{prompt}", "prompt": "x"}),
    "get_liveness": Shared(),
    "get_readiness": Shared(),
    "get_metrics": Shared(),
}
QUERY = {"create_dataset": {"name": "x", "kind": "rows"}}


@pytest.fixture
def ids(http_harness: HttpHarness) -> dict[str, str]:
    """Resources of alice, an upload of the provider, and a key of a second provider."""
    _, student = http_harness.add_pair()
    http_harness.add_dataset()
    prompt = http_harness.push("alice", prompt_bytes(student.hash)).json()["id"]
    body = {"prompt": prompt, "target": "large", "dataset": "public"}
    job = http_harness("alice", "POST", "/v1/transfers", json=body).json()["id"]
    with http_harness.database.write() as session:
        _, lease = states.claim(session, job, lease_seconds=600, max_attempts=3) or pytest.fail("not claimed")
        states.record_progress(session, lease, progress=0.1, stage="transfer", step=1, steps=2, metrics={"loss": 1.0})
        _, http_harness.keys["other"] = create_key(session, name="other", role=Role.PROVIDER)
    http_harness._clients["other"] = http_harness._client("other")
    upload = http_harness("provider", "POST", "/v1/uploads", json={"name": "big", "kind": "rows"}).json()["id"]
    http_harness("provider", "PUT", f"/v1/uploads/{upload}/parts/1", content=ROWS)
    shared = {"model": "small", "path": "config.json", "dataset": "public", "number": "1"}
    return {"prompt": prompt, "job": job, "upload": upload, "report": job, **shared}


def send(http_harness: HttpHarness, who: str, operation: str, ids: dict[str, str]) -> Any:
    """Send the request of a case, with the ids filled in."""
    method, template = operations(http_harness.app.openapi())[operation]
    case = CASES[operation]
    path = template.replace("{path}", ids["path"]).format_map(ids)
    body = getattr(case, "body", None)
    content: dict[str, Any] = {}
    if isinstance(body, bytes):
        content = {"content": body}
    elif body is not None:
        content = {"json": json.loads(json.dumps(body).replace("{prompt}", ids["prompt"]))}
    return http_harness(who, method, path, params=QUERY.get(operation), headers=getattr(case, "headers", {}), **content)


def operations_of(kind: type) -> list[str]:
    return [name for name, case in CASES.items() if isinstance(case, kind)]


def test_every_operation_has_a_case_and_every_id_in_a_path_is_known(
    http_harness: HttpHarness, ids: dict[str, str]
) -> None:
    documented = operations(http_harness.app.openapi())
    assert set(documented) == set(CASES)
    for operation, (_, path) in documented.items():
        owned = [name for name in ("prompt", "job", "upload", "report") if f"{{{name}}}" in path]
        assert not (owned and isinstance(CASES[operation], Shared | Listed)), operation
        path.replace("{path}", "x").format_map(ids)


def test_foreign_resources_are_not_found_and_do_not_change(http_harness: HttpHarness, ids: dict[str, str]) -> None:
    before = http_harness.everything()
    for operation in operations_of(Foreign):
        answer = send(http_harness, "bob", operation, ids)
        assert code(answer) == (404, "not_found"), operation
        unknown = send(http_harness, "bob", operation, ids | {"prompt": "prm_" + "0" * 24, "job": "job_" + "0" * 24})
        assert code(unknown) == code(answer), operation
        varying = {"detail", "message", "request_id", "prompt", "job"}  # they quote the requested id
        assert {k: v for k, v in unknown.json().items() if k not in varying} == {
            k: v for k, v in answer.json().items() if k not in varying
        }, operation
    stream = http_harness("bob", "GET", f"/v1/jobs/{ids['job']}/events", headers={"Accept": "text/event-stream"})
    assert code(stream) == (404, "not_found")
    assert http_harness._clients["bob"].head(f"/v1/prompts/{ids['prompt']}/file").status_code == 404
    assert http_harness.everything() == before


def test_the_owner_and_the_provider_find_them(http_harness: HttpHarness, ids: dict[str, str]) -> None:
    """So the refusals above depend on the caller, not on an error in the request."""
    for operation in operations_of(Foreign):
        if operation in (
            "remove_prompt",
            "create_predictions",
            "create_completion",
        ):  # a job needs it; no predictor runs here
            continue
        for who in ("alice", "provider"):
            assert send(http_harness, who, operation, ids).status_code < 300, (operation, who)
    with http_harness.database.write() as session:
        session.execute(update(JobRow).values(state="cancelled"))
    assert send(http_harness, "alice", "remove_prompt", ids).status_code == 204


def test_lists_contain_nothing_of_others(http_harness: HttpHarness, ids: dict[str, str]) -> None:
    for operation in operations_of(Listed):
        assert send(http_harness, "bob", operation, ids).json()["items"] == [], operation
        for who in ("alice", "provider"):
            assert len(send(http_harness, who, operation, ids).json()["items"]) == 1, (operation, who)


def test_provider_operations_are_refused_to_owners_and_change_nothing(
    http_harness: HttpHarness, ids: dict[str, str]
) -> None:
    before = http_harness.everything()
    for operation in operations_of(Providers):
        for who in ("alice", "bob"):
            assert code(send(http_harness, who, operation, ids)) == (403, "forbidden"), operation
        case = CASES[operation]
        if isinstance(case, Providers) and case.own:
            assert code(send(http_harness, "other", operation, ids)) == (404, "not_found"), operation
    assert http_harness.everything() == before
