"""Orders become queued jobs once they fit together; a job is its owner's; its history can be followed."""

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


class TestOrders:
    def test_an_order_is_a_queued_job_of_its_caller(self, http_harness: HttpHarness, prompt: str) -> None:
        orders = (
            ("provider", "distillations", DISTIL),
            ("alice", "transfers", transfer(prompt)),
            ("alice", "evaluations", {"model": "small", "dataset": "public", "prompt": prompt}),
            ("bob", "evaluations", {"model": "large", "dataset": "public", "task": TASK.model_dump()}),
        )
        for who, path, order in orders:
            answer = http_harness(who, "POST", f"/v1/{path}", json=order)
            assert answer.status_code == 202, answer.text
            job = Job.model_validate(answer.json())
            assert (job.state, job.progress, job.attempt) == (JobState.QUEUED, 0, 0)
            assert job.request.items() >= {k: v for k, v in order.items() if k != "task"}.items()
            assert http_harness(who, "GET", f"/v1/jobs/{job.id}").json() == answer.json()
            assert http_harness.job(job.id).owner_key_id == http_harness.key_ids[who]
        kinds = [each["kind"] for each in http_harness("provider", "GET", "/v1/jobs").json()["items"]]
        assert kinds == ["evaluate", "evaluate", "transfer", "distil"]

    def test_distilling_is_the_providers(self, http_harness: HttpHarness, student: ModelRow) -> None:
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
    def test_a_distillation_must_fit(
        self, http_harness: HttpHarness, student: ModelRow, change: dict[str, Any], expected: tuple[int, str]
    ) -> None:
        before = http_harness.everything()
        assert code(http_harness("provider", "POST", "/v1/distillations", json={**DISTIL, **change})) == expected
        assert http_harness.everything() == before

    def test_two_distillations_cant_make_the_same_name(self, http_harness: HttpHarness, student: ModelRow) -> None:
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
    def test_a_transfer_must_fit(
        self, http_harness: HttpHarness, prompt: str, change: dict[str, Any], expected: tuple[int, str]
    ) -> None:
        http_harness.add_model("other")
        http_harness.add_dataset("prose", b"One.\nTwo.\n", "corpus")
        before = http_harness.everything()
        assert code(http_harness("alice", "POST", "/v1/transfers", json={**transfer(prompt), **change})) == expected
        assert http_harness.everything() == before

    def test_a_prompt_of_the_target_itself_needs_no_transfer(
        self, http_harness: HttpHarness, student: ModelRow
    ) -> None:
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
    def test_an_evaluation_must_fit(
        self, http_harness: HttpHarness, student: ModelRow, change: dict[str, Any], expected: tuple[int, str]
    ) -> None:
        http_harness.add_dataset("prose", b"One.\nTwo.\n", "corpus")
        order = {"model": "large", "dataset": "public", "task": TASK.model_dump()}
        assert code(http_harness("alice", "POST", "/v1/evaluations", json={**order, **change})) == expected

    def test_nobody_uses_anothers_prompt(self, http_harness: HttpHarness, prompt: str) -> None:
        order = {"model": "large", "dataset": "public", "prompt": prompt}
        assert code(http_harness("bob", "POST", "/v1/transfers", json=transfer(prompt))) == (404, "not_found")
        assert code(http_harness("bob", "POST", "/v1/evaluations", json=order)) == (404, "not_found")

    def test_one_key_cant_fill_the_queue(self, small_front: HttpHarness) -> None:
        http_harness = small_front
        http_harness.add_dataset()
        http_harness.add_pair()
        order = {"model": "large", "dataset": "public", "task": TASK.model_dump()}
        first, second, third = (http_harness("alice", "POST", "/v1/evaluations", json=order) for _ in range(3))
        assert (first.status_code, second.status_code) == (202, 202)
        assert code(third) == (429, "too_many_requests")
        assert http_harness("bob", "POST", "/v1/evaluations", json=order).status_code == 202
        http_harness("alice", "POST", f"/v1/jobs/{first.json()['id']}/cancel")
        assert http_harness("alice", "POST", "/v1/evaluations", json=order).status_code == 202


class TestJobs:
    def test_an_owner_sees_its_own_jobs_only(self, http_harness: HttpHarness, prompt: str) -> None:
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

    def test_pages_hold_every_item_once_whatever_is_added(self, http_harness: HttpHarness, prompt: str) -> None:
        def order() -> str:
            return str(http_harness("alice", "POST", "/v1/transfers", json=transfer(prompt)).json()["id"])

        jobs = [order() for _ in range(7)]
        found, cursor = [], None
        while True:
            params = {"limit": 3} if cursor is None else {"limit": 3, "cursor": cursor}
            page = http_harness("alice", "GET", "/v1/jobs", params=params).json()
            found += [each["id"] for each in page["items"]]
            order()
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert found == jobs[::-1]

    @pytest.mark.parametrize("cursor", ["x", "====", "bm90aGluZw", "\u00e9", "a" * 200, "MjAyNnwx"])
    def test_a_foreign_cursor_is_refused(self, http_harness: HttpHarness, cursor: str) -> None:
        assert code(http_harness("alice", "GET", "/v1/jobs", params={"cursor": cursor})) == (422, "invalid_input")

    def test_numbers_that_are_none_are_not_shown(self, http_harness: HttpHarness, prompt: str) -> None:
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

    def work(self, http_harness: HttpHarness, job: str, steps: int, pause: float = 0.0) -> None:
        """What a worker would do."""
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

    def test_pages_give_the_whole_history_in_order(self, http_harness: HttpHarness, job: str) -> None:
        self.work(http_harness, job, 5)
        whole = http_harness("alice", "GET", f"/v1/jobs/{job}/events").json()
        assert [each["sequence"] for each in whole["items"]] == list(range(1, 14))
        assert whole["next_cursor"] is None
        found, params = [], {"limit": 4}
        while True:
            page = http_harness("alice", "GET", f"/v1/jobs/{job}/events", params=params).json()
            found += page["items"]
            if page["next_cursor"] is None:
                break
            params = {"limit": 4, "cursor": page["next_cursor"]}
        assert found == whole["items"]
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

    def test_a_stream_goes_on_while_the_job_does(self, http_harness: HttpHarness, job: str) -> None:
        worker = threading.Thread(target=self.work, args=(http_harness, job, 5, 0.2))
        worker.start()
        events = self.follow(http_harness, job)
        worker.join()
        assert [event.get("id") for event in events] == [*map(str, range(1, 14)), None]
        assert events[-1]["event"] == "end"
        assert json.loads(events[-1]["data"])["state"] == "succeeded"
        pages = http_harness("alice", "GET", f"/v1/jobs/{job}/events").json()["items"]
        assert [json.loads(event["data"]) for event in events[:-1]] == pages

    def test_a_stream_goes_on_behind_the_last_event_seen(self, http_harness: HttpHarness, job: str) -> None:
        self.work(http_harness, job, 200)
        events = self.follow(http_harness, job, **{"Last-Event-ID": "10"})
        assert [event.get("id") for event in events] == [*map(str, range(11, 404)), None]

    def test_a_stream_ends_with_its_key(self, http_harness: HttpHarness, job: str) -> None:
        seen: list[list[dict[str, str]]] = []
        follower = threading.Thread(target=lambda: seen.append(self.follow(http_harness, job)))
        follower.start()
        waits = http_harness.app.state.event_feed._waits
        while not waits and follower.is_alive():  # until it has seen all and waits for more
            time.sleep(0.01)
        with http_harness.database.write() as session:
            revoke_key(session, "alice")
        follower.join(60.0)
        assert [event.get("id") for event in seen[0]] == ["1"]

    @pytest.mark.parametrize("number", ["x", "-1", "1.5", "9" * 30])
    def test_a_place_is_a_number(self, http_harness: HttpHarness, job: str, number: str) -> None:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": number}
        answer = http_harness("alice", "GET", f"/v1/jobs/{job}/events", headers=headers)
        assert code(answer) == (422, "invalid_input")
        assert code(http_harness("alice", "GET", f"/v1/jobs/{job}/events?after={number}")) == (422, "invalid_input")
