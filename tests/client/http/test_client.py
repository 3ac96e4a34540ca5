"""The client against a real API server: typed responses, typed errors, jobs."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from post_client import Client, build_upload
from post_client.http.transports import run_all
from post_client.resources.jobs import Job
from post_server.db.tables import JobRow
from post_server.jobs import states
from post_shared.errors import (
    Cancelled,
    Conflict,
    Forbidden,
    InvalidInput,
    JobFailed,
    NotFound,
    PromptMismatch,
    Timeout,
    Unauthenticated,
    Unavailable,
)
from post_shared.files.prompt_file import read_prompt
from post_shared.schemas.datasets import Dataset
from post_shared.schemas.jobs import JobState
from post_shared.schemas.models import ModelRole
from post_shared.schemas.prompts import PromptRole
from tests.server.http_harness import ROWS, TASK, HttpHarness, prompt_bytes


def push(client: Client, model_hash: str, seed: int = 0) -> Any:
    return client.prompts.upload(build_upload(read_prompt(prompt_bytes(model_hash, seed=seed))))


def start_transfer(http_harness: HttpHarness, owner: Client) -> Job:
    target, student = http_harness.add_pair()
    http_harness.add_dataset("public")
    prompt = push(owner, student.hash)
    return owner.transfers.create(prompt=prompt.id, target=target.name, dataset="public", steps=3)


# --- resources ----------------------------------------------------------------------------------------


def test_models_and_datasets_read_back(http_harness: HttpHarness, owner: Client, provider: Client) -> None:
    target, student = http_harness.add_pair()
    created = provider.datasets.create(name="amazon", kind="rows", content=ROWS, licence="MIT")
    assert owner.datasets.get("amazon") == owner.datasets.get(created.id) == created
    assert [created] == list(owner.datasets.list())
    assert {model.id for model in owner.models.list()} == {target.id, student.id}
    assert [model.id for model in owner.models.list(role=ModelRole.STUDENT)] == [student.id]
    assert owner.models.manifest("small").hash == owner.models.get(student.id).hash == student.hash


def test_a_list_gives_every_item_once(http_harness: HttpHarness, provider: Client) -> None:
    names = {f"set-{number}" for number in range(7)}
    for name in names:
        http_harness.add_dataset(name)
    listed = [item.name for item in run_all(provider._http.pages("/v1/datasets", Dataset, limit=2))]
    assert len(listed) == 7
    assert set(listed) == names


def test_a_prompt_comes_back_as_it_was_sent(http_harness: HttpHarness, owner: Client) -> None:
    _, student = http_harness.add_pair()
    sent = prompt_bytes(student.hash, dp=True)
    prompt = owner.prompts.upload(build_upload(read_prompt(sent)))
    assert owner.prompts.upload(build_upload(read_prompt(sent))).id == prompt.id
    assert owner.prompts.file(prompt.id) == sent
    assert (prompt.epsilon, prompt.delta, prompt.task) == (8.0, 1e-5, TASK)
    assert list(owner.prompts.list(role=PromptRole.SOURCE)) == [prompt]
    owner.prompts.delete(prompt.id)
    assert list(owner.prompts.list()) == []
    with pytest.raises(NotFound):
        owner.prompts.get(prompt.id)


# --- errors -------------------------------------------------------------------------------------------


def test_errors_have_their_classes_and_request_ids(http_harness: HttpHarness, owner: Client) -> None:
    _, student = http_harness.add_pair()
    with pytest.raises(NotFound) as missing:
        owner.models.get("nothing")
    assert missing.value.request_id
    with pytest.raises(Forbidden):
        owner.datasets.create(name="mine", kind="rows", content=ROWS)
    with pytest.raises(PromptMismatch):
        push(owner, "0" * 64)
    with (
        Client(url=http_harness.url, api_key="post_wrong") as stranger,
        pytest.raises(Unauthenticated),
    ):
        stranger.models.get(student.id)
    http_harness.add_dataset("public")
    with pytest.raises(Conflict):
        Client(url=http_harness.url, api_key=http_harness.keys["provider"]).datasets.create(
            name="public", kind="rows", content=ROWS + ROWS
        )


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "p", "target": "t", "dataset": "d", "alpha": 2.0},
        {"prompt": "p", "target": "t", "dataset": "d", "steps": 0},
        {"prompt": "p", "target": "t", "dataset": "d", "stepz": 10},
    ],
)
def test_invalid_options_are_refused_before_sending(options: dict[str, Any]) -> None:
    with Client(url="http://127.0.0.1:1", api_key="post_x") as client, pytest.raises(InvalidInput) as refused:
        client.transfers.create(**options)
    assert next(name for name in ("alpha", "steps", "stepz") if name in options) in refused.value.detail


def test_the_error_for_a_refused_connection_names_post_serve() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        free = listening.getsockname()[1]
    with (
        Client(url=f"http://127.0.0.1:{free}", api_key="post_x", attempts=2) as client,
        pytest.raises(Unavailable, match="post serve"),
    ):
        client.models.get("x")


def test_server_and_key_come_from_the_environment(http_harness: HttpHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POST_URL", raising=False)
    monkeypatch.delenv("POST_API_KEY", raising=False)
    with pytest.raises(InvalidInput, match="POST_URL"):
        Client()
    monkeypatch.setenv("POST_URL", http_harness.url)
    with pytest.raises(InvalidInput, match="POST_API_KEY"):
        Client()
    monkeypatch.setenv("POST_API_KEY", http_harness.keys["bob"])
    with Client() as client:
        assert list(client.models.list()) == []


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://user:secret@x", "http://x/?q=1", "http://[", "://"])
def test_invalid_addresses_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput):
        Client(url=url, api_key="post_x")


# --- jobs ---------------------------------------------------------------------------------------------


def test_wait_ends_as_the_job_ends(http_harness: HttpHarness, owner: Client) -> None:
    job = start_transfer(http_harness, owner)
    with pytest.raises(Timeout):
        job.wait(timeout=0.1)
    observed: list[JobState] = []
    threading.Timer(0.3, lambda: owner.jobs.get(job.id).cancel()).start()
    with pytest.raises(Cancelled):
        job.wait(progress=lambda document: observed.append(document.state))
    assert observed[0] is JobState.QUEUED
    assert observed[-1] is JobState.CANCELLED
    assert [each.id for each in owner.transfers.list()] == [job.id]
    assert list(owner.distillations.list()) == []


def test_a_failed_job_raises_the_servers_reason(http_harness: HttpHarness, owner: Client) -> None:
    job = start_transfer(http_harness, owner)
    with http_harness.database.write() as session:
        row = session.get_one(JobRow, job.id)
        row.state = JobState.FAILED
        row.error = InvalidInput("the public texts are all empty").problem()
    with pytest.raises(JobFailed, match="the public texts are all empty") as failed:
        job.wait()
    assert failed.value.fields["cause"] == "invalid_input"


def test_events_are_the_same_listed_and_followed(http_harness: HttpHarness, owner: Client) -> None:
    job = start_transfer(http_harness, owner)

    def cancel_soon() -> None:
        time.sleep(0.3)
        with http_harness.database.write() as session:
            states.request_cancel(session, job.id)

    thread = threading.Thread(target=cancel_soon)
    thread.start()
    followed = list(job.events(follow=True))
    thread.join()
    listed = list(owner.jobs.events(job.id))
    assert followed == listed
    assert [event.sequence for event in listed] == list(range(1, len(listed) + 1))
    assert list(job.events(after=1)) == listed[1:]


def test_another_owners_job_is_unknown(http_harness: HttpHarness, owner: Client) -> None:
    job = start_transfer(http_harness, owner)
    with Client(url=http_harness.url, api_key=http_harness.keys["bob"]) as bob, pytest.raises(NotFound):
        bob.jobs.get(job.id)
