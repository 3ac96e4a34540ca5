"""No input to any endpoint causes a server error."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.http_harness import TASK, HttpHarness, prompt_bytes

REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/distillations": {"target": "large", "name": "tiny", "corpus": ["public"], "keep_layers": [0, 3], "steps": 5},
    "/v1/transfers": {"prompt": "prm", "target": "large", "dataset": "public", "alpha": 0.5, "seed": 1},
    "/v1/evaluations": {"model": "large", "dataset": "public", "task": TASK.model_dump(), "max_rows": 5},
    "/v1/reports": {
        "student": "small",
        "tasks": [{"dataset": "public", "task": TASK.model_dump()}],
        "members": ["public"],
        "non_members": ["public"],
        "texts": 5,
    },
    "/v1/predictions": {"model": "large", "task": TASK.model_dump(), "texts": ["x"], "max_new_tokens": 3},
}
TEXT = st.text(max_size=20) | st.sampled_from(["large", "small", "public", "\0", "\ud800", "../..", "{text}", "auto"])
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.integers(-(2**70), 2**70) | TEXT
VALUE = st.recursive(SCALAR, lambda each: st.lists(each, max_size=3) | st.dictionaries(TEXT, each, max_size=3))


@pytest.fixture(scope="module")
def harness() -> Iterator[HttpHarness]:
    with tempfile.TemporaryDirectory() as home:
        http_harness = HttpHarness(Path(home), jobs_per_key=10_000)
        http_harness.add_dataset()
        http_harness.push("alice", prompt_bytes(http_harness.add_pair()[1].hash))
        yield http_harness
        http_harness.close()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_documents(harness: HttpHarness, data: st.DataObject) -> None:
    """Valid requests with some members replaced by arbitrary values."""
    path = data.draw(st.sampled_from(sorted(REQUESTS)))
    changes = data.draw(st.dictionaries(st.sampled_from([*REQUESTS[path], "more"]), VALUE, max_size=3))
    answer = harness("provider", "POST", path, content=_json({**REQUESTS[path], **changes}), headers=_JSON)
    assert answer.status_code in (202, 400, 404, 409, 422) or (answer.status_code == 503 and "predictions" in path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_paths_and_queries(harness: HttpHarness, data: st.DataObject) -> None:
    """Every endpoint with arbitrary parameters."""
    paths = {path: operations for path, operations in harness.app.openapi()["paths"].items() if path.startswith("/v1/")}
    path = data.draw(st.sampled_from(sorted(paths)))
    method = data.draw(st.sampled_from(sorted(paths[path])))
    parameters = [item for item in paths[path][method].get("parameters", []) if item["in"] == "query"]
    parts = TEXT.map(lambda text: quote(text.encode("utf-8", "surrogatepass"), safe=""))
    concrete = path
    while "{" in concrete:
        begin, end = concrete.index("{"), concrete.index("}") + 1
        concrete = concrete[:begin] + data.draw(parts) + concrete[end:]
    query = {item["name"]: data.draw(parts | st.integers().map(str)) for item in parameters if data.draw(st.booleans())}
    address = concrete + ("?" + "&".join(f"{name}={value}" for name, value in query.items()) if query else "")
    content = data.draw(st.binary(max_size=50)) if method == "post" else None
    answer = harness("provider", method.upper(), address, content=content)
    assert answer.status_code < 500, (method, address, answer.text)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_uploads(harness: HttpHarness, data: st.DataObject) -> None:
    """Prompt files with a few changed bytes, and almost valid JSON lines."""
    if data.draw(st.booleans()):
        with_errors = bytearray(prompt_bytes(harness("alice", "GET", "/v1/models/small").json()["hash"]))
        for _ in range(data.draw(st.integers(1, 4))):
            with_errors[data.draw(st.integers(0, len(with_errors) - 1))] = data.draw(st.integers(0, 255))
        answer = harness.push("bob", bytes(with_errors))
        assert answer.status_code in (200, 201, 422)
    else:
        lines = data.draw(st.lists(VALUE.map(_json) | st.binary(max_size=30), max_size=4))
        content = b"\n".join(lines)
        answer = harness("provider", "POST", "/v1/datasets?name=fuzz&kind=rows", content=content)
        assert answer.status_code in (200, 201, 409, 422)


_JSON = {"Content-Type": "application/json"}


def _json(value: Any) -> bytes:
    import json

    return json.dumps(value).encode("ascii")
