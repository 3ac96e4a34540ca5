"""The asynchronous client matches the blocking one: the same methods, errors and retries."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest

from post_client import AsyncClient, Client, build_upload
from post_client.resources._sync import Method
from post_client.students.download import student_hash
from post_shared.errors import Cancelled, InvalidInput, NotFound, Unavailable
from post_shared.files.prompt_file import read_prompt
from post_shared.schemas.jobs import JobState
from post_shared.schemas.prompts import PromptRole
from tests.client.http.test_retries import problem
from tests.server.http_harness import ROWS, HttpHarness, prompt_bytes


class Failing(httpx.AsyncBaseTransport):
    """The real network, except for the first responses, which are given, and one file body, which is cut off."""

    def __init__(self, *responses: httpx.Response | Exception, cut: int = 0) -> None:
        self.responses, self.cut = list(responses), cut
        self.requests: list[httpx.Request] = []
        self._real = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.responses:
            given = self.responses.pop(0)
            if isinstance(given, Exception):
                raise given
            return given
        response = await self._real.handle_async_request(request)
        if not self.cut or "/files/" not in request.url.path:
            return response
        body = (await response.aread())[: self.cut]
        self.cut = 0

        class Cut(httpx.AsyncByteStream):
            async def __aiter__(self):  # type: ignore[no-untyped-def]
                yield body
                raise httpx.ReadError("cut", request=request)

        return httpx.Response(response.status_code, headers=response.headers, stream=Cut())

    async def aclose(self) -> None:
        await self._real.aclose()


def connect(http_harness: HttpHarness, who: str = "alice", transport: Failing | None = None) -> AsyncClient:
    return AsyncClient(url=http_harness.url, api_key=http_harness.keys[who], transport=transport, attempts=3)


def test_the_whole_workflow_of_an_owner(http_harness: HttpHarness, tmp_path: Path) -> None:
    target, student = http_harness.add_pair()

    async def provide() -> None:
        async with connect(http_harness, "provider") as client:
            rows = tmp_path / "rows.jsonl"
            rows.write_bytes(ROWS)
            created = await client.datasets.create(name="public", kind="rows", content=rows, licence="MIT")
            assert [each async for each in client.datasets.list()] == [created] == [await client.datasets.get("public")]

    async def go() -> None:
        async with connect(http_harness) as client:
            await client.models.download("small", tmp_path / "student")
            prompt = await client.prompts.upload(build_upload(read_prompt(prompt_bytes(student.hash))))
            assert await client.prompts.file(prompt.id) == prompt_bytes(student.hash)
            assert [each async for each in client.prompts.list(role=PromptRole.SOURCE)] == [prompt]
            job = await client.transfers.create(prompt=prompt.id, target=target.name, dataset="public", steps=3)
            states: list[JobState] = []
            waiting = asyncio.ensure_future(job.wait(progress=lambda document: states.append(document.state)))
            while not states:
                await asyncio.sleep(0.01)
            await (await client.jobs.get(job.id)).cancel()
            with pytest.raises(Cancelled):
                await waiting
            assert list(dict.fromkeys(states)) == [JobState.QUEUED, JobState.CANCELLED]
            followed = [event async for event in job.events(follow=True)]
            assert followed == [event async for event in client.jobs.events(job.id)]
            assert (await job.metrics()).series == {}
            assert [each.id async for each in client.transfers.list()] == [job.id]

    asyncio.run(provide())
    asyncio.run(go())
    assert student_hash(tmp_path / "student") == student.hash


def test_a_broken_download_resumes_where_it_stopped(http_harness: HttpHarness, tmp_path: Path) -> None:
    _, student = http_harness.add_pair()
    failing = Failing(cut=10)

    async def go() -> None:
        async with connect(http_harness, transport=failing) as client:
            await client.models.download("small", tmp_path / "student")

    asyncio.run(go())
    assert student_hash(tmp_path / "student") == student.hash
    assert [each.headers.get("range") for each in failing.requests if "/files/" in each.url.path][:2] == [
        None,
        "bytes=10-",
    ]
    assert failing.requests[2].headers["if-range"].startswith('"')


def test_what_is_retried_and_what_is_not(http_harness: HttpHarness) -> None:
    http_harness.add_pair()
    lost = httpx.ReadError("gone")
    failing = Failing(problem(503, "unavailable", **{"Retry-After": "0"}), lost)

    async def go() -> None:
        async with connect(http_harness, transport=failing) as client:
            assert (await client.models.get("large")).name == "large"
            assert len(failing.requests) == 3
            with pytest.raises(NotFound) as missing:
                await client.models.get("none")
            assert missing.value.request_id
            assert len(failing.requests) == 4
            failing.responses = [problem(503, "unavailable")]
            with pytest.raises(Unavailable):
                await client.prompts.delete("prm_x")
            assert len(failing.requests) == 5

    asyncio.run(go())


def test_an_upload_whose_response_is_lost_is_retried_with_the_same_key(
    http_harness: HttpHarness, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(ROWS * 5000)
    failing = Failing(httpx.ReadError("gone"))

    async def go() -> None:
        async with connect(http_harness, "provider", failing) as client:
            assert (await client.datasets.create(name="public", kind="rows", content=rows)).rows == 10_000

    asyncio.run(go())
    keys = [request.headers["idempotency-key"] for request in failing.requests]
    assert len(keys) == 2
    assert keys[0] == keys[1]


def test_a_missing_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POST_URL", raising=False)
    with pytest.raises(InvalidInput, match="POST_URL"):
        AsyncClient()


def resources(client: Any) -> dict[str, Any]:
    return {name: resource for name, resource in vars(client).items() if not name.startswith("_")}


def methods(resource: type) -> dict[str, Any]:
    return {name: method for name, method in vars(resource).items() if not name.startswith("_")}


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    """A blocking resource wraps every method of the asynchronous one, with the same signature and docstring."""
    blocking = resources(Client(url="http://127.0.0.1:1", api_key="x"))
    asynchronous = resources(AsyncClient(url="http://127.0.0.1:1", api_key="x"))
    assert list(blocking) == list(asynchronous)
    for name, resource in asynchronous.items():
        wrappers = methods(type(blocking[name]))
        assert set(wrappers) == set(methods(type(resource))), name
        for method, wrapper in wrappers.items():
            assert isinstance(wrapper, Method), (name, method)
            own, wrapped = getattr(blocking[name], method), getattr(resource, method)
            assert inspect.signature(own).parameters == inspect.signature(wrapped).parameters, (name, method)
            assert own.__doc__ == wrapped.__doc__ is not None, (name, method)


def test_a_blocking_client_works_inside_a_running_loop(http_harness: HttpHarness) -> None:
    http_harness.add_pair()

    async def go() -> list[str]:
        with Client(url=http_harness.url, api_key=http_harness.keys["alice"]) as client:
            first = next(client.models.list())  # the iterator isn't exhausted
            return [first.name, *(model.name for model in client.models.list())]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asyncio.run(go()) == ["small", "small", "large"]
