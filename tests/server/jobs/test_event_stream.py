"""Requests that wait for blobs or the broker don't delay database reads, which share a few threads."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from post_server.api import health
from post_server.db import database
from post_server.jobs import endpoints
from post_server.storage.blob_store import BlobStore
from tests.server.http_harness import ROWS, HttpHarness, code

REQUESTS = 12  # more than there are reader threads, with any database


def test_a_part_that_hangs_is_not_ready_and_blocks_one_thread(
    http_harness: HttpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang, hanging = threading.Event(), threading.Semaphore(0)

    def wait(*arguments: object) -> bool:
        hanging.release()
        return hang.wait(60)

    monkeypatch.setattr(BlobStore, "exists", wait)
    monkeypatch.setattr(health, "_CHECK_SECONDS", 0.2)
    try:
        for _ in range(3):
            answer = httpx.get(f"{http_harness.url}/readyz", timeout=30, trust_env=False)
            assert answer.status_code == 503
            checks = answer.json()["checks"]
            assert (checks["records"], checks["blobs"]) == ("ok", "TimeoutError")
        assert hanging.acquire(timeout=30)
        assert not hanging.acquire(blocking=False)
        assert http_harness("alice", "GET", "/v1/models").status_code == 200
    finally:
        hang.set()
    monkeypatch.setattr(health, "_CHECK_SECONDS", 30.0)
    assert httpx.get(f"{http_harness.url}/readyz", timeout=60, trust_env=False).json()["checks"]["blobs"] == "ok"


def test_blobs_that_hang_dont_delay_database_reads(http_harness: HttpHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    http_harness("provider", "POST", "/v1/datasets?name=rows&kind=rows", content=ROWS).raise_for_status()
    hang = threading.Event()
    hanging = threading.Semaphore(0)
    open_blob = BlobStore.open

    def wait(*arguments: object) -> object:
        hanging.release()
        hang.wait(60)
        return open_blob(*arguments)

    monkeypatch.setattr(BlobStore, "open", wait)
    with ThreadPoolExecutor(REQUESTS) as pool:
        headers = {"Authorization": f"Bearer {http_harness.keys['alice']}"}
        futures = [
            pool.submit(
                httpx.get, f"{http_harness.url}/v1/datasets/rows/preview", headers=headers, timeout=90, trust_env=False
            )
            for _ in range(REQUESTS)
        ]
        try:
            for _ in futures:
                assert hanging.acquire(timeout=30)
            assert http_harness("alice", "GET", "/v1/models").status_code == 200
        finally:
            hang.set()
    assert {each.result().status_code for each in futures} == {200}


def test_few_threads_read_the_database_for_many_requests(http_harness: HttpHarness) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: _list_jobs(http_harness), range(60)))
    assert {answer.status_code for answer in answers} == {200}
    readers = [each.name for each in threading.enumerate() if each.name.startswith("records_")]
    assert 1 <= len(set(readers)) <= 8


def _list_jobs(http_harness: HttpHarness) -> httpx.Response:
    headers = {"Authorization": f"Bearer {http_harness.keys['alice']}"}
    return httpx.get(f"{http_harness.url}/v1/jobs", headers=headers, timeout=30, trust_env=False)


def test_a_database_that_hangs_is_unavailable_after_a_while(
    http_harness: HttpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_TIMEOUT_SECONDS", 0.5)
    hang = threading.Event()
    monkeypatch.setattr(endpoints, "visible_job", lambda *_: hang.wait(60))
    try:
        assert code(http_harness("alice", "GET", "/v1/jobs/job_1")) == (503, "unavailable")
        began = time.monotonic()
        http_harness.app.state.context.database.dispose()
        assert time.monotonic() - began < 5
    finally:
        hang.set()
