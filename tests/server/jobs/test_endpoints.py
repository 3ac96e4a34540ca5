"""Valid requests become queued jobs, which belong to their caller and whose events can be followed."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import pytest

from post_server.auth.keys import revoke_key
from post_server.db.tables import ModelRow
from post_server.jobs import states
from post_shared.schemas.jobs import Job, JobState
from tests.server.http_harness import TASK, HttpHarness, code, prompt_bytes

DISTIL = {"target": "large", "name": "tiny", "corpus": ["public"], "keep_layers": 2, "steps": 1}


@pytest.fixture
def student(http_harness: HttpHarness) -> ModelRow:
    http_harness.add_dataset()
    return http_harness.add_pair()[1]


@pytest.fixture
def prompt(http_harness: HttpHarness, student: ModelRow) -> str:
    return str(http_harness.push("alice", prompt_bytes(student.hash)).json()["id"])


def transfer(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "target": "large", "dataset": "public", **more}


class TestCreate:
    def test_a_request_becomes_a_queued_job_of_its_caller(self, http_harness: HttpHarness, prompt: str) -> None:
        requests = (
            ("provider", "distillations", DISTIL),
            ("alice", "transfers", transfer(prompt)),
            ("alice", "evaluations", {"model": "small", "dataset": "public", "prompt": prompt}),
            ("bob", "evaluations", {"model": "large", "dataset": "public", "task": TASK.model_dump()}),
        )
        for who, path, body in requests:
            answer = http_harness(who, "POST", f"/v1/{path}", json=body)
            assert answer.status_code == 202, answer.text
            job = Job.model_validate(answer.json())
            assert (job.state, job.progress, job.attempt) == (JobState.QUEUED, 0, 0)
            assert job.request.items() >= {k: v for k, v in body.items() if k != "task"}.items()
            assert http_harness(who, "GET", f"/v1/jobs/{job.id}").json() == answer.json()
            assert http_harness.job(job.id).owner_key_id == http_harness.key_ids[who]
        kinds = [each["kind"] for each in http_harness("provider", "GET", "/v1/jobs").json()["items"]]
        assert kinds == ["evaluate", "evaluate", "transfer", "distil"]

    def test_only_a_provider_distils(self, http_harness: HttpHarness, student: ModelRow) -> None:
        assert code(http_harness("alice", "POST", "/v1/distillations", json=DISTIL)) == (403, "forbidden")

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"target": "none"}, (404, "not_found")),
            ({"target": "small"}, (404, "not_found")),
            ({"corpus": ["public", "none"]}, (404, "not_found")),
            ({"corpus": []}, (422, "invalid_input")),
            ({"name": "small"}, (409, "conflict")),
            ({"name": "../x"}, (422, "invalid_input")),
            ({"keep_layers": 4}, (422, "invalid_input")),  # all layers: the student would be the target
            ({"keep_layers": [0, 1, 2, 3]}, (422, "invalid_input")),
            ({"keep_layers": [0, 4]}, (422, "invalid_input")),
            ({"keep_layers": [-1, 0]}, (422, "invalid_input")),
            ({"keep_layers": [1, 1]}, (422, "invalid_input")),
            ({"keep_layers": []}, (422, "invalid_input")),
            ({"keep_layers": [0, 3], "layer_pattern": "even"}, (422, "invalid_input")),
            ({"steps": 0}, (422, "invalid_input")),
            ({"seed": -1}, (422, "invalid_input")),
            ({"learning_rate": "NaN"}, (422, "invalid_input")),
            ({"stpes": 5}, (422, "invalid_input")),
            ({"templates": ["It was"]}, (422, "invalid_input")),
        ],
    )
    def test_invalid_distillations_are_refused(
        self, http_harness: HttpHarness, student: ModelRow, change: dict[str, Any], expected: tuple[int, str]
    ) -> None:
        before = http_harness.everything()
        assert code(http_harness("provider", "POST", "/v1/distillations", json={**DISTIL, **change})) == expected
        assert http_harness.everything() == before

    def test_two_distillations_cant_have_the_same_name(self, http_harness: HttpHarness, student: ModelRow) -> None:
        http_harness("provider", "POST", "/v1/distillations", json=DISTIL)
        assert code(http_harness("provider", "POST", "/v1/distillations", json=DISTIL)) == (409, "conflict")

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"prompt": "prm_none"}, (404, "not_found")),
            ({"target": "small"}, (404, "not_found")),
            ({"target": "other"}, (422, "prompt_mismatch")),
            ({"dataset": "none"}, (404, "not_found")),
            ({"dataset": "prose", "alpha": "auto"}, (422, "invalid_input")),
            ({"alpha": 1.5}, (422, "invalid_input")),
            ({"alpha": "best"}, (422, "invalid_input")),
        ],
    )
    def test_invalid_transfers_are_refused(
        self, http_harness: HttpHarness, prompt: str, change: dict[str, Any], expected: tuple[int, str]
    ) -> None:
        http_harness.add_model("other")
        http_harness.add_dataset("prose", b"One.\nTwo.\n", "corpus")
        before = http_harness.everything()
        assert code(http_harness("alice", "POST", "/v1/transfers", json={**transfer(prompt), **change})) == expected
        assert http_harness.everything() == before

    def test_a_prompt_of_the_target_itself_is_refused(self, http_harness: HttpHarness, student: ModelRow) -> None:
        large = http_harness("alice", "GET", "/v1/models/large").json()
        own = http_harness.push("alice", prompt_bytes(large["hash"])).json()["id"]
        assert code(http_harness("alice", "POST", "/v1/transfers", json=transfer(own))) == (422, "prompt_mismatch")

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"task": None}, (422, "invalid_input")),
            ({"task": {"template": "no slot"}}, (422, "task_invalid")),
            ({"task": {"template": "{text}", "label_words": {"a": []}}}, (422, "task_invalid")),
            ({"prompt": "prm_none", "task": None}, (404, "not_found")),
            ({"dataset": "prose"}, (422, "invalid_input")),
            ({"model": "none"}, (404, "not_found")),
        ],
    )
    def test_invalid_evaluations_are_refused(
        self, http_harness: HttpHarness, student: ModelRow, change: dict[str, Any], expected: tuple[int, str]
    ) -> None:
        http_harness.add_dataset("prose", b"One.\nTwo.\n", "corpus")
        body = {"model": "large", "dataset": "public", "task": TASK.model_dump()}
        assert code(http_harness("alice", "POST", "/v1/evaluations", json={**body, **change})) == expected

    def test_nobody_uses_the_prompt_of_another(self, http_harness: HttpHarness, prompt: str) -> None:
        body = {"model": "large", "dataset": "public", "prompt": prompt}
        assert code(http_harness("bob", "POST", "/v1/transfers", json=transfer(prompt))) == (404, "not_found")
        assert code(http_harness("bob", "POST", "/v1/evaluations", json=body)) == (404, "not_found")

    def test_one_key_cant_fill_the_queue(self, limited_http_harness: HttpHarness) -> None:
        http_harness = limited_http_harness
        http_harness.add_dataset()
        http_harness.add_pair()
        body = {"model": "large", "dataset": "public", "task": TASK.model_dump()}
        first, second, third = (http_harness("alice", "POST", "/v1/evaluations", json=body) for _ in range(3))
        assert (first.status_code, second.status_code) == (202, 202)
        assert code(third) == (429, "too_many_requests")
        assert http_harness("bob", "POST", "/v1/evaluations", json=body).status_code == 202
        http_harness("alice", "POST", f"/v1/jobs/{first.json()['id']}/cancel")
        assert http_harness("alice", "POST", "/v1/evaluations", json=body).status_code == 202


class TestJobs:
    def test_an_owner_sees_only_its_own_jobs(self, http_harness: HttpHarness, prompt: str) -> None:
        mine = http_harness("alice", "POST", "/v1/transfers", json=transfer(prompt)).json()["id"]
        paths = (("GET", ""), ("POST", "/cancel"), ("GET", "/events"))
        for method, path in paths:
            assert code(http_harness("bob", method, f"/v1/jobs/{mine}{path}")) == (404, "not_found")
            assert code(http_harness("bob", method, f"/v1/jobs/job_none{path}")) == (404, "not_found")
        stream = http_harness("bob", "GET", f"/v1/jobs/{mine}/events", headers={"Accept": "text/event-stream"})
        assert code(stream) == (404, "not_found")
        assert http_harness.job(mine).state is JobState.QUEUED
        assert http_harness("bob", "GET", "/v1/jobs").json()["items"] == []
        for who in ("alice", "provider"):
            assert [each["id"] for each in http_harness(who, "GET", "/v1/jobs").json()["items"]] == [mine]

    def test_a_queued_job_is_cancelled_at_once_and_stays_so(self, http_harness: HttpHarness, prompt: str) -> None:
        job = http_harness("alice", "POST", "/v1/transfers", json=transfer(prompt)).json()["id"]
        for _ in range(2):
            assert http_harness("alice", "POST", f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
        assert http_harness("alice", "GET", f"/v1/jobs/{job}").json()["finished_at"] is not None

    def test_lists_are_filtered(self, http_harness: HttpHarness, prompt: str) -> None:
        first, second = (
            http_harness("alice", "POST", "/v1/transfers", json=transfer(prompt)).json()["id"] for _ in "ab"
        )
        http_harness("alice", "POST", f"/v1/jobs/{first}/cancel")

        def ids(**params: str) -> list[str]:
            return [each["id"] for each in http_harness("alice", "GET", "/v1/jobs", params=params).json()["items"]]

        assert ids() == ids(kind="transfer") == [second, first]
        assert ids(state="cancelled") == [first]
        assert ids(kind="distil") == []
        assert code(http_harness("alice", "GET", "/v1/jobs", params={"kind": "x"})) == (422, "invalid_input")

    def test_pages_have_every_item_once_while_others_are_added(self, http_harness: HttpHarness, prompt: str) -> None:
        def create() -> str:
            return str(http_harness("alice", "POST", "/v1/transfers", json=transfer(prompt)).json()["id"])

        jobs = [create() for _ in range(7)]
        ids, cursor = [], None
        while True:
            params = {"limit": 3} if cursor is None else {"limit": 3, "cursor": cursor}
            page = http_harness("alice", "GET", "/v1/jobs", params=params).json()
            ids += [each["id"] for each in page["items"]]
            create()
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert ids == jobs[::-1]

    @pytest.mark.parametrize("cursor", ["x", "====", "bm90aGluZw", "\u00e9", "a" * 200, "MjAyNnwx"])
    def test_an_invalid_cursor_is_refused(self, http_harness: HttpHarness, cursor: str) -> None:
        assert code(http_harness("alice", "GET", "/v1/jobs", params={"cursor": cursor})) == (422, "invalid_input")

    def test_nan_metrics_are_not_shown(self, http_harness: HttpHarness, prompt: str) -> None:
        job = http_harness("alice", "POST", "/v1/transfers", json=transfer(prompt)).json()["id"]
        with http_harness.database.write() as session:
            _, lease = states.claim(session, job, lease_seconds=60, max_attempts=3) or pytest.fail("not claimed")
            metrics = {"loss": 0.5, "odd": float("nan")}
            states.record_progress(session, lease, progress=0.5, stage="transfer", step=1, steps=2, metrics=metrics)
        shown = http_harness("alice", "GET", f"/v1/jobs/{job}").json()
        assert shown["metrics"] == {"loss": 0.5}
        assert http_harness("alice", "GET", f"/v1/jobs/{job}/events").status_code == 200


class TestEvents:
    @pytest.fixture
    def job(self, http_harness: HttpHarness, prompt: str) -> str:
        return str(http_harness("alice", "POST", "/v1/transfers", json=transfer(prompt)).json()["id"])

    def run_job(self, http_harness: HttpHarness, job: str, steps: int, pause: float = 0.0) -> None:
        """As a worker would."""
        with http_harness.database.write() as session:
            claimed = states.claim(session, job, lease_seconds=60, max_attempts=3)
            assert claimed is not None
        for step in range(steps):
            with http_harness.database.write() as session:
                states.record_progress(
                    session,
                    claimed[1],
                    progress=step / steps,
                    stage="transfer",
                    step=step,
                    steps=steps,
                    metrics={"loss": 1.0},
                )
            time.sleep(pause)
        with http_harness.database.write() as session:
            states.finish(session, claimed[1], {"alpha": 0.5})

    def test_pages_give_all_events_in_order(self, http_harness: HttpHarness, job: str) -> None:
        self.run_job(http_harness, job, 5)
        whole = http_harness("alice", "GET", f"/v1/jobs/{job}/events").json()
        assert [each["sequence"] for each in whole["items"]] == list(range(1, 14))
        assert whole["next_cursor"] is None
        events, params = [], {"limit": 4}
        while True:
            page = http_harness("alice", "GET", f"/v1/jobs/{job}/events", params=params).json()
            events += page["items"]
            if page["next_cursor"] is None:
                break
            params = {"limit": 4, "cursor": page["next_cursor"]}
        assert events == whole["items"]
        assert http_harness("alice", "GET", f"/v1/jobs/{job}/events?after=11").json()["items"] == whole["items"][11:]

    def follow(self, http_harness: HttpHarness, job: str, **headers: str) -> list[dict[str, str]]:
        accept = {"Accept": "text/event-stream", "Authorization": f"Bearer {http_harness.keys['alice']}", **headers}
        events: list[dict[str, str]] = [{}]
        with httpx.stream("GET", f"{http_harness.url}/v1/jobs/{job}/events", headers=accept, trust_env=False) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if not line:
                    events.append({})
                elif not line.startswith(":"):
                    name, value = line.split(": ", 1)
                    events[-1][name] = value
        return [event for event in events if event]

    def test_a_stream_continues_until_the_job_ends(self, http_harness: HttpHarness, job: str) -> None:
        worker = threading.Thread(target=self.run_job, args=(http_harness, job, 5, 0.2))
        worker.start()
        events = self.follow(http_harness, job)
        worker.join()
        assert [event.get("id") for event in events] == [*map(str, range(1, 14)), None]
        assert events[-1]["event"] == "end"
        assert json.loads(events[-1]["data"])["state"] == "succeeded"
        pages = http_harness("alice", "GET", f"/v1/jobs/{job}/events").json()["items"]
        assert [json.loads(event["data"]) for event in events[:-1]] == pages

    def test_a_stream_resumes_after_the_last_event_id(self, http_harness: HttpHarness, job: str) -> None:
        self.run_job(http_harness, job, 200)
        events = self.follow(http_harness, job, **{"Last-Event-ID": "10"})
        assert [event.get("id") for event in events] == [*map(str, range(11, 404)), None]

    def test_a_stream_ends_with_its_key(self, http_harness: HttpHarness, job: str) -> None:
        streams: list[list[dict[str, str]]] = []
        follower = threading.Thread(target=lambda: streams.append(self.follow(http_harness, job)))
        follower.start()
        waits = http_harness.app.state.event_feed._waits
        while not waits and follower.is_alive():  # until it has received all and waits for more
            time.sleep(0.01)
        with http_harness.database.write() as session:
            revoke_key(session, "alice")
        follower.join(60.0)
        assert [event.get("id") for event in streams[0]] == ["1"]

    @pytest.mark.parametrize("number", ["x", "-1", "1.5", "9" * 30])
    def test_a_position_is_a_number(self, http_harness: HttpHarness, job: str, number: str) -> None:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": number}
        answer = http_harness("alice", "GET", f"/v1/jobs/{job}/events", headers=headers)
        assert code(answer) == (422, "invalid_input")
        assert code(http_harness("alice", "GET", f"/v1/jobs/{job}/events?after={number}")) == (422, "invalid_input")
