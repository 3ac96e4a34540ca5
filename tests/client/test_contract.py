"""The clients match the OpenAPI document: both clients reach every operation, every parameter can be passed, and what
they send and read has the members that the document describes."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from post_client import AsyncClient, Client, build_upload
from post_client.resources.jobs import AsyncJob, Job
from post_shared.errors import Conflict, InvalidInput, NotFound, Unavailable
from post_shared.files.prompt_file import read_prompt
from post_shared.schemas.reports import TradeOffReport
from tests.server.http_harness import ROWS, TASK, HttpHarness, prompt_bytes
from tests.server.operations import operation_of, operations, resolved


@dataclass
class Fixtures:
    """The server's objects that the calls refer to."""

    folder: Path
    prompt: str
    spare_prompt: str
    job: str
    upload: str
    spare_upload: str
    student_hash: str

    @property
    def file(self) -> Path:
        path = self.folder / "rows.jsonl"
        path.write_bytes(ROWS)
        return path


REPORT = {"student": "small", "tasks": {"public": TASK}, "members": ["public"], "non_members": ["other"]}
EVALUATION = {"model": "large", "dataset": "public", "task": TASK}
CALLS: dict[str, Callable[[Any, Fixtures], Any]] = {
    "models.get": lambda client, has: client.models.get("small"),
    "models.list": lambda client, has: client.models.list(role="student"),
    "models.manifest": lambda client, has: client.models.manifest("small"),
    "models.download": lambda client, has: client.models.download("small", has.folder / "student"),
    "datasets.create": lambda client, has: client.datasets.create(
        name="fresh", kind="rows", content=ROWS, licence="MIT"
    ),
    "datasets.get": lambda client, has: client.datasets.get("public"),
    "datasets.list": lambda client, has: client.datasets.list(),
    "datasets.preview": lambda client, has: client.datasets.preview("public", rows=1),
    "uploads.create": lambda client, has: client.uploads.create(name="parts", kind="rows", licence="MIT"),
    "uploads.get": lambda client, has: client.uploads.get(has.upload),
    "uploads.list": lambda client, has: client.uploads.list(),
    "uploads.put": lambda client, has: client.uploads.put(has.upload, number=1, content=ROWS),
    "uploads.send": lambda client, has: client.uploads.send(has.upload, file=has.file),
    "uploads.finish": lambda client, has: client.uploads.finish(has.upload, sha256="0" * 64),
    "uploads.delete": lambda client, has: client.uploads.delete(has.spare_upload),
    "prompts.upload": lambda client, has: client.prompts.upload(
        build_upload(read_prompt(prompt_bytes(has.student_hash, seed=9)))
    ),
    "prompts.get": lambda client, has: client.prompts.get(has.prompt),
    "prompts.list": lambda client, has: client.prompts.list(role="source"),
    "prompts.file": lambda client, has: client.prompts.file(has.prompt),
    "prompts.delete": lambda client, has: client.prompts.delete(has.spare_prompt),
    "jobs.get": lambda client, has: client.jobs.get(has.job),
    "jobs.list": lambda client, has: client.jobs.list(kind=["evaluate"], state="queued"),
    "jobs.metrics": lambda client, has: client.jobs.metrics(has.job, name=["loss"]),
    "jobs.events": lambda client, has: client.jobs.events(has.job, after=0),
    "distillations.create": lambda client, has: client.distillations.create(
        target="large", name="tiny", corpus=["public"], keep_layers=2, steps=1
    ),
    "distillations.list": lambda client, has: client.distillations.list(),
    "transfers.create": lambda client, has: client.transfers.create(
        prompt=has.prompt, target="large", dataset="public", alpha="auto"
    ),
    "transfers.list": lambda client, has: client.transfers.list(),
    "evaluations.create": lambda client, has: client.evaluations.create(**EVALUATION),
    "evaluations.list": lambda client, has: client.evaluations.list(),
    "reports.create": lambda client, has: client.reports.create(**REPORT),
    "reports.list": lambda client, has: client.reports.list(),
    "reports.get": lambda client, has: client.reports.get(has.job),
    "predictions.create": lambda client, has: client.predictions.create(model="large", texts=["x"], task=TASK),
    "completions.create": lambda client, has: client.completions.create(model="large", prompt="x", max_tokens=1),
    "completions.stream": lambda client, has: client.completions.stream(model="large", prompt=["x"]),
    "server.alive": lambda client, has: client.server.alive(),
    "server.ready": lambda client, has: client.server.ready(),
    "server.metrics": lambda client, has: client.server.metrics(),
}
PAGING = {"limit", "cursor"}
INTERNAL = {"snapshot"}
"""Parameters that the client sets itself, in ``job.wait``."""
REFUSALS = (NotFound, Conflict, InvalidInput, Unavailable)
"""There is no broker, and an evaluation isn't a report: only the requests count."""


class Recording(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """The real network; records the requests."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self._real, self._async = httpx.HTTPTransport(), httpx.AsyncHTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self._real.handle_request(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return await self._async.handle_async_request(request)

    def close(self) -> None:
        self._real.close()

    async def aclose(self) -> None:
        await self._async.aclose()


@pytest.fixture
def fixtures(http_harness: HttpHarness, tmp_path: Path) -> Fixtures:
    _, student = http_harness.add_pair()
    http_harness.add_dataset("public")
    http_harness.add_dataset("other", ROWS.replace(b"fine", b"good"))
    prompts = [
        http_harness("provider", "POST", "/v1/prompts", content=prompt_bytes(student.hash, seed=n)).json()["id"]
        for n in (1, 2)
    ]
    body = EVALUATION | {"task": TASK.model_dump()}
    job = http_harness("provider", "POST", "/v1/evaluations", json=body).json()["id"]
    uploads = [
        http_harness("provider", "POST", "/v1/uploads", json={"name": f"up-{n}", "kind": "rows"}).json()["id"]
        for n in (1, 2)
    ]
    return Fixtures(tmp_path, *prompts, job, *uploads, student.hash)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[httpx.Response, type[BaseModel]]]:
    """Every response that a client has parsed, with its document class."""
    from post_client.http import responses

    documents: list[tuple[httpx.Response, type[BaseModel]]] = []
    real = responses.parse

    def parse(response: httpx.Response, document: type[Any]) -> Any:
        documents.append((response, document))
        return real(response, document)

    for module in [module for name, module in list(sys.modules.items()) if name.startswith("post_client")]:
        if getattr(module, "parse", None) is real:
            monkeypatch.setattr(module, "parse", parse)
    return documents


def reach_all(http_harness: HttpHarness, fixtures: Fixtures, transport: Recording) -> None:
    """Call every method of the blocking client."""
    with Client(url=http_harness.url, api_key=http_harness.keys["provider"], transport=transport, attempts=1) as client:
        for call in CALLS.values():
            _all(lambda call=call: call(client, fixtures))  # type: ignore[misc]
        job = client.jobs.get(fixtures.job)
        assert isinstance(job, Job)
        job.refresh().cancel()
        list(job.events(follow=True))


def _all(call: Callable[[], Any]) -> None:
    with suppress(*REFUSALS):
        result = call()
        if isinstance(result, Iterator):
            list(result)


async def reach_all_async(http_harness: HttpHarness, fixtures: Fixtures, transport: Recording) -> None:
    """Call every method of the asynchronous client."""
    async with AsyncClient(
        url=http_harness.url, api_key=http_harness.keys["provider"], transport=transport, attempts=1
    ) as client:
        for call in CALLS.values():
            with suppress(*REFUSALS):
                result = call(client, fixtures)
                if isinstance(result, AsyncIterator):
                    async for _ in result:
                        pass
                else:
                    await result
        job = await client.jobs.get(fixtures.job)
        assert isinstance(job, AsyncJob)
        await (await job.refresh()).cancel()
        async for _ in job.events(follow=True):
            pass


def test_every_method_is_called_here() -> None:
    client = Client(url="http://127.0.0.1:1", api_key="x")
    methods = {
        f"{name}.{method}"
        for name, resource in vars(client).items()
        if not name.startswith("_")
        for method in vars(type(resource))
        if not method.startswith("_")
    }
    assert methods == set(CALLS)


@pytest.mark.parametrize("kind", ["blocking", "asynchronous"])
def test_every_operation_is_reached_and_every_document_is_as_described(
    http_harness: HttpHarness, fixtures: Fixtures, parsed: list[tuple[httpx.Response, type[BaseModel]]], kind: str
) -> None:
    transport = Recording()
    if kind == "blocking":
        reach_all(http_harness, fixtures, transport)
    else:
        asyncio.run(reach_all_async(http_harness, fixtures, transport))
    document = http_harness.app.openapi()
    reached = {
        operation_of(document, request.method, request.url.path)["operationId"]: request
        for request in transport.requests
    }
    assert set(operations(document)) - set(reached) == set()
    for request in transport.requests:
        _check_request(document, request)
    assert len({document_class for _, document_class in parsed}) > 10
    for response, document_class in parsed:
        _check_response(document, response, document_class)


def _check_request(document: dict[str, Any], request: httpx.Request) -> None:
    operation = operation_of(document, request.method, request.url.path)
    parameters = {each["name"] for each in operation.get("parameters", []) if each["in"] == "query"}
    assert set(request.url.params) <= parameters, (request.url, parameters)
    body = operation.get("requestBody", {}).get("content", {})
    sent = request.headers.get("content-type")
    assert (sent in body) if body else sent is None, (request.url, sent)
    if sent == "application/json":
        schema = resolved(document, body[sent]["schema"])
        members = json.loads(request.content)
        assert set(schema.get("required", [])) <= set(members) <= set(schema["properties"]), request.url


def _check_response(document: dict[str, Any], response: httpx.Response, document_class: type[BaseModel]) -> None:
    operation = operation_of(document, response.request.method, response.request.url.path)
    described = operation["responses"][str(response.status_code)]["content"]["application/json"]["schema"]
    read = document_class.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
    assert resolved(document, described)["properties"].keys() == read["properties"].keys(), response.request.url


def test_every_member_of_every_document_is_the_same_on_both_sides(http_harness: HttpHarness) -> None:
    """Documents of the same name have the same members in the client and in the OpenAPI document."""
    schemas = http_harness.app.openapi()["components"]["schemas"]
    modules = [module for name, module in sys.modules.items() if name.startswith("post_shared.") and "schemas" in name]
    assert TradeOffReport.__module__ in [module.__name__ for module in modules]
    classes = {
        name: each
        for module in modules
        for name, each in vars(module).items()
        if isinstance(each, type) and issubclass(each, BaseModel) and name in schemas
    }
    assert len(classes) > 15
    for name, each in classes.items():
        own = each.model_json_schema(ref_template="#/components/schemas/{model}")
        assert own["properties"].keys() == schemas[name]["properties"].keys(), name
        assert set(own.get("required", [])) == set(schemas[name].get("required", [])), name


def test_every_query_parameter_can_be_passed(http_harness: HttpHarness) -> None:
    """Every query parameter of the API is a parameter of some method."""
    document = http_harness.app.openapi()
    client = Client(url="http://127.0.0.1:1", api_key="x")
    for operation, (method, path) in operations(document).items():
        queries = {
            each["name"]
            for each in document["paths"][path][method.lower()].get("parameters", [])
            if each["in"] == "query" and each["name"] not in PAGING
        }
        resource = getattr(client, path.split("/")[2] if path.startswith("/v1/") else "server")
        methods = [getattr(resource, name) for name in vars(type(resource)) if not name.startswith("_")]
        parameters = {name for call in methods for name in inspect.signature(call).parameters}
        assert queries - INTERNAL <= parameters, operation
