"""The asynchronous client does what the blocking one does: the same verbs, the same errors, the same repeats."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from pathlib import Path
from typing import Any

import httpx
import pytest

from post_client import AsyncClient, Client, build_upload
from post_client.resources._sync import Verb
from post_client.students.download import student_hash
from post_shared.errors import Cancelled, InvalidInput, NotFound, Unavailable
from post_shared.files.prompt_file import read_prompt
from post_shared.schemas.jobs import JobState
from post_shared.schemas.prompts import PromptRole
from tests.client.http.test_retries import problem
from tests.server.http_harness import ROWS, HttpHarness, prompt_bytes


class Failing(httpx.AsyncBaseTransport):
    """The real network, but for the first answers, which are made here, and bodies of files, cut once."""

    def __init__(self, *answers: httpx.Response | Exception, cut: int = 0) -> None:
        self.answers, self.truncated = list(answers), cut
        self.seen: list[httpx.Request] = []
        self._real = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        response = await self._real.handle_async_request(request)
        if not self.truncated or "/files/" not in request.url.path:
            return response
        body = (await response.aread())[: self.truncated]
        self.truncated = 0

        class Cut(httpx.AsyncByteStream):
            async def __aiter__(self):  # type: ignore[no-untyped-def]
                yield body
                raise httpx.ReadError("cut", request=request)

        return httpx.Response(response.status_code, headers=response.headers, stream=Cut())

    async def aclose(self) -> None:
        await self._real.aclose()


def connect(http_harness: HttpHarness, who: str = "alice", transport: Failing | None = None) -> AsyncClient:
    return AsyncClient(url=http_harness.url, api_key=http_harness.keys[who], transport=transport, attempts=3)


def test_the_journey_of_an_owner(http_harness: HttpHarness, tmp_path: Path) -> None:
    target, student = http_harness.add_pair()

    async def provide() -> None:
        async with connect(http_harness, "provider") as client:
            rows = tmp_path / "rows.jsonl"
            rows.write_bytes(ROWS)
            made = await client.datasets.create(name="public", kind="rows", content=rows, licence="MIT")
            assert [each async for each in client.datasets.list()] == [made] == [await client.datasets.get("public")]

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


def test_a_broken_download_goes_on_where_it_stopped(http_harness: HttpHarness, tmp_path: Path) -> None:
    _, student = http_harness.add_pair()
    failing = Failing(cut=10)

    async def go() -> None:
        async with connect(http_harness, transport=failing) as client:
            await client.models.download("small", tmp_path / "student")

    asyncio.run(go())
    assert student_hash(tmp_path / "student") == student.hash
    assert [each.headers.get("range") for each in failing.seen if "/files/" in each.url.path][:2] == [None, "bytes=10-"]
    assert failing.seen[2].headers["if-range"].startswith('"')


def test_what_is_repeated_and_what_is_not(http_harness: HttpHarness) -> None:
    http_harness.add_pair()
    away = httpx.ReadError("gone")
    failing = Failing(problem(503, "unavailable", **{"Retry-After": "0"}), away)

    async def go() -> None:
        async with connect(http_harness, transport=failing) as client:
            assert (await client.models.get("large")).name == "large"
            assert len(failing.seen) == 3
            with pytest.raises(NotFound) as missing:
                await client.models.get("none")
            assert missing.value.request_id
            assert len(failing.seen) == 4
            failing.answers = [problem(503, "unavailable")]
            with pytest.raises(Unavailable):
                await client.prompts.delete("prm_x")
            assert len(failing.seen) == 5

    asyncio.run(go())


def test_an_upload_whose_answer_is_lost_is_the_same_upload(http_harness: HttpHarness, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(ROWS * 5000)
    failing = Failing(httpx.ReadError("gone"))

    async def go() -> None:
        async with connect(http_harness, "provider", failing) as client:
            assert (await client.datasets.create(name="public", kind="rows", content=rows)).rows == 10_000

    asyncio.run(go())
    keys = [request.headers["idempotency-key"] for request in failing.seen]
    assert len(keys) == 2
    assert keys[0] == keys[1]


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POST_URL", raising=False)
    with pytest.raises(InvalidInput, match="POST_URL"):
        AsyncClient()


def nouns(client: Any) -> dict[str, Any]:
    return {name: noun for name, noun in vars(client).items() if not name.startswith("_")}


def verbs(noun: type) -> dict[str, Any]:
    return {name: verb for name, verb in vars(noun).items() if not name.startswith("_")}


def test_both_clients_have_the_same_verbs_with_the_same_parameters() -> None:
    """A blocking noun is a list of the asynchronous one's verbs; nothing may be left out or spelt otherwise."""
    blocking = Client(url="http://127.0.0.1:1", api_key="x")
    other = AsyncClient(url="http://127.0.0.1:1", api_key="x")
    assert list(nouns(blocking)) == list(nouns(other))
    for name, noun in nouns(other).items():
        mine = type(nouns(blocking)[name])
        assert set(verbs(mine)) == set(verbs(type(noun))), name
        for verb, listed in verbs(mine).items():
            assert isinstance(listed, Verb), (name, verb)
            given = inspect.signature(getattr(nouns(blocking)[name], verb))
            assert given.parameters == inspect.signature(getattr(noun, verb)).parameters, (name, verb)
            assert getattr(nouns(blocking)[name], verb).__doc__ == getattr(noun, verb).__doc__ is not None, (name, verb)


def test_a_blocking_client_works_inside_a_running_loop(http_harness: HttpHarness) -> None:
    http_harness.add_pair()

    async def go() -> list[str]:
        with Client(url=http_harness.url, api_key=http_harness.keys["alice"]) as client:
            first = next(client.models.list())  # left before its end
            return [first.name, *(model.name for model in client.models.list())]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asyncio.run(go()) == ["small", "small", "large"]
