"""Every error is a helpful problem document that reveals nothing private."""

from __future__ import annotations

import errno
import json
import logging
import re
import socket
from io import StringIO
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy.exc import OperationalError

from post_server.auth.keys import revoke_key
from post_server.http import raw_body
from tests.server.backing import temporary_files
from tests.server.http_harness import ROWS, TASK, HttpHarness, check_problem, code, prompt_bytes
from tests.server.server_harness import wait_for

SECRET = "my private review of a film"


@pytest.fixture
def log(http_harness: HttpHarness) -> StringIO:
    """Everything that the server logs from now on, at level DEBUG."""
    stream = StringIO()
    logger = logging.getLogger("post")
    logger.setLevel("DEBUG")
    (handler,) = logger.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    return stream


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/nothing", (404, "not_found")),
        ("GET", "/v1", (404, "not_found")),
        ("PUT", "/v1/models", (405, "method_not_allowed")),
        ("TRACE", "/v1/models", (405, "method_not_allowed")),
        ("GET", "/v1/models?limit=0", (422, "invalid_input")),
        ("GET", "/v1/models?limit=x", (422, "invalid_input")),
        ("GET", "/v1/models?limit=99999999999999999999", (422, "invalid_input")),
        ("POST", "/v1/transfers", (422, "invalid_input")),
        ("GET", "/static/../app.py", (404, "not_found")),
        ("GET", "/static/%2e%2e/app.py", (404, "not_found")),
    ],
)
def test_errors_of_the_framework_are_problems_too(
    http_harness: HttpHarness, method: str, path: str, expected: tuple[int, str]
) -> None:
    answer = http_harness("provider", method, path)
    assert code(answer) == expected


def test_a_wrong_method_is_told_the_allowed_ones(http_harness: HttpHarness) -> None:
    for path, methods in (("/v1/models", "GET"), ("/v1/datasets", "GET, POST"), ("/v1/prompts/x", "DELETE, GET")):
        assert http_harness("alice", "PUT", path).headers["allow"] == methods


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"null", b'{"a": NaN}', b"\xff\xfe", b'{"a":' * 10_000])
def test_a_body_that_is_not_a_document_is_refused(http_harness: HttpHarness, body: bytes) -> None:
    answer = http_harness(
        "provider", "POST", "/v1/transfers", content=body, headers={"Content-Type": "application/json"}
    )
    assert code(answer) == (422, "invalid_input")


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer post_wrong", "Basic YTpi", "Bearer \u00e9".encode(), "bearer  x y z"]
)
def test_nothing_is_accessible_without_a_valid_key(http_harness: HttpHarness, header: str | bytes | None) -> None:
    headers: Any = {} if header is None else {"Authorization": header}
    for path in http_harness.app.openapi()["paths"]:
        if path.startswith("/v1/"):
            for method in http_harness.app.openapi()["paths"][path]:
                concrete = re.sub(r"{\w+}", "x", path)
                if http_harness.app.openapi()["paths"][path][method].get("requestBody"):
                    continue  # an invalid document may be refused first
                answer = http_harness(None, method.upper(), concrete, headers=headers)
                assert code(answer) == (401, "unauthenticated"), (method, path)
                assert answer.headers["www-authenticate"] == "Bearer"


def test_a_revoked_key_is_refused(http_harness: HttpHarness) -> None:
    assert http_harness("alice", "GET", "/v1/models").status_code == 200
    with http_harness.database.write() as session:
        revoke_key(session, "alice")
    assert code(http_harness("alice", "GET", "/v1/models")) == (401, "unauthenticated")


def test_a_defect_tells_the_user_only_its_request_id(http_harness: HttpHarness, log: StringIO) -> None:
    def defect() -> None:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise RuntimeError(SECRET) from error

    http_harness.app.router.routes.clear()
    http_harness.app.add_api_route("/defect", defect)
    answer = http_harness(None, "GET", "/defect", headers={"X-Request-Id": "find-me-in-the-log"})
    assert code(answer) == (500, "internal_error")
    assert SECRET not in answer.text
    assert answer.json()["request_id"] == "find-me-in-the-log"
    (line,) = [json.loads(line) for line in log.getvalue().splitlines() if "RuntimeError" in line]
    assert line["request_id"] == "find-me-in-the-log"
    assert "in defect" in line["where"]
    assert SECRET not in log.getvalue()


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("SELECT secret of alice", {}, Exception("no route to host")),
        ConnectionResetError("bucket with a SELECT secret of alice"),
    ],
    ids=["database", "store"],
)
def test_an_outage_is_worth_a_retry(http_harness: HttpHarness, error: Exception) -> None:
    def away() -> None:
        raise error

    http_harness.app.router.routes.clear()
    http_harness.app.add_api_route("/away", away)
    answer = http_harness(None, "GET", "/away")
    assert code(answer) == (503, "unavailable")
    assert answer.headers["retry-after"]
    assert "SELECT" not in answer.text
    assert "alice" not in answer.text


def test_every_answer_has_a_request_id(http_harness: HttpHarness) -> None:
    own = http_harness("alice", "GET", "/v1/models", headers={"X-Request-Id": "abc-123-def"})
    assert own.headers["x-request-id"] == "abc-123-def"
    for bad in ("short", "a b c d e f g h", "x" * 200, '"><script>'):
        new = http_harness("alice", "GET", "/v1/models", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{24}", new)


def test_no_private_text_and_no_key_reaches_the_log_or_an_error(http_harness: HttpHarness, log: StringIO) -> None:
    """Texts in prediction requests, wrong members, queries, headers and broken uploads."""
    _, student = http_harness.add_pair()
    http_harness.push("alice", prompt_bytes(student.hash))
    task = TASK.model_dump()
    answers = [
        http_harness("alice", "POST", "/v1/predictions", json={"model": "large", "task": task, "texts": [SECRET]}),
        http_harness("alice", "POST", "/v1/predictions", json={"model": "large", "task": task, "texts": SECRET}),
        http_harness("alice", "POST", "/v1/predictions", json={"model": "large", "task": task, "texts": [SECRET, 5]}),
        http_harness("alice", "POST", "/v1/predictions", json={"model": "large", "n": SECRET, "texts": [SECRET]}),
        http_harness("alice", "POST", "/v1/predictions", content=f'{{"texts": ["{SECRET}"'.encode()),
        http_harness("alice", "POST", "/v1/prompts", content=SECRET.encode()),
        http_harness("provider", "POST", "/v1/datasets?name=a&kind=rows", content=f'{{"text": "{SECRET}'.encode()),
        http_harness("alice", "GET", "/v1/models", params={"cursor": SECRET}),
        http_harness("alice", "GET", "/v1/models", headers={"X-Note": SECRET}),
    ]
    for answer in answers:
        assert SECRET not in answer.text
    written = log.getvalue()
    assert written.count('"event": "request"') >= len(answers)
    assert SECRET not in written
    assert SECRET.replace(" ", "+") not in written
    assert http_harness.keys["alice"] not in written
    assert http_harness.key_ids["alice"] in written


def test_a_document_has_a_maximum_size(limited_http_harness: HttpHarness) -> None:
    document = {"model": "large", "task": TASK.model_dump(), "texts": ["x" * 5000]}
    answer = limited_http_harness("alice", "POST", "/v1/predictions", json=document)
    assert code(answer) == (413, "payload_too_large")
    pieces = iter([b"x" * 1000] * 10)
    headers = {"Content-Type": "application/json"}
    answer = limited_http_harness("alice", "POST", "/v1/predictions", content=pieces, headers=headers)
    assert code(answer) == (413, "payload_too_large")


def test_health_readiness_and_metrics_need_no_key(http_harness: HttpHarness) -> None:
    assert http_harness(None, "GET", "/livez").json() == {"status": "ok", "checks": {}}
    ready = http_harness(None, "GET", "/readyz")
    assert ready.status_code == 503  # no broker is running here
    assert ready.json()["checks"]["records"] == ready.json()["checks"]["blobs"] == "ok"
    http_harness("alice", "GET", "/v1/models/unknown")
    text = http_harness(None, "GET", "/metrics").text
    assert 'post_http_requests_total{method="GET",route="/v1/models/{model}",status="404"} 1.0' in text
    assert 'post_jobs{kind="distil",state="queued"} 0.0' in text


def test_the_dashboard_is_served_and_may_load_nothing_from_other_hosts(http_harness: HttpHarness) -> None:
    answer = http_harness(None, "GET", "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    for kind in ("href", "src"):
        for link in re.findall(rf'{kind}="([^"]+)"', answer.text):
            if link != "data:,":
                assert link.startswith("/")
                assert http_harness(None, "GET", link).status_code == 200
    assert "<style" not in answer.text
    assert "onclick" not in answer.text
    script = http_harness(None, "GET", "/static/page.js").text
    assert "innerHTML" not in script
    assert "http" not in script


def test_problems_match_their_documentation(http_harness: HttpHarness) -> None:
    document = http_harness(None, "GET", "/openapi.json").json()
    ids = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            ids.append(operation["operationId"])
            for status, answer in operation["responses"].items():
                if status >= "400" and path.startswith("/v1/"):
                    assert list(answer["content"]) == ["application/problem+json"], (method, path, status)
                    codes = answer["content"]["application/problem+json"]["schema"]["allOf"][1]["properties"]["code"]
                    assert codes["enum"] == sorted(codes["enum"]) != [], (method, path, status)
            if path.startswith("/v1/"):
                assert {"401", "422"} <= operation["responses"].keys(), (method, path)
                assert operation["security"], (method, path)
    assert len(ids) == len(set(ids))
    assert "HTTPValidationError" not in document["components"]["schemas"]
    refusal = http_harness("alice", "GET", "/v1/jobs/none")
    check_problem(refusal)
    declared = document["paths"]["/v1/jobs/{job}"]["get"]["responses"]["404"]["content"]["application/problem+json"]
    assert declared["schema"]["allOf"][1]["properties"]["code"]["enum"] == [refusal.json()["code"]]


def send_partial_body(http_harness: HttpHarness, path: str, key: str) -> socket.socket:
    """A connection that has sent only the beginning of a document."""
    address = urlsplit(http_harness.url)
    connection = socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=10)
    lines = [f"POST {path} HTTP/1.1", "Host: post", f"Authorization: Bearer {key}", "Content-Length: 1000"]
    connection.sendall("\r\n".join([*lines, "Content-Type: application/json", "", '{"model": "']).encode())
    return connection


@pytest.mark.parametrize("path", ["/v1/predictions", "/v1/completions", "/v1/evaluations"])
def test_no_body_is_read_without_a_valid_key(http_harness: HttpHarness, path: str) -> None:
    with send_partial_body(http_harness, path, "post_wrong") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("path", ["/v1/prompts", "/v1/datasets?name=cut&kind=rows"])
def test_a_client_that_disconnects_is_no_defect(http_harness: HttpHarness, log: StringIO, path: str) -> None:
    send_partial_body(http_harness, path, http_harness.keys["provider"]).close()
    wait_for(lambda: '"status": 499' in log.getvalue(), 10)
    assert "defect" not in log.getvalue()
    assert temporary_files(http_harness.settings) == []


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, (503, "unavailable")), (errno.EIO, (500, "internal_error"))]
)
def test_a_full_disk_is_no_defect(
    http_harness: HttpHarness, monkeypatch: pytest.MonkeyPatch, number: int, expected: tuple[int, str]
) -> None:
    def write(*_: object) -> None:
        raise OSError(number, "the disk")

    monkeypatch.setattr(raw_body, "_append", write)
    assert code(http_harness("provider", "POST", "/v1/datasets?name=big&kind=rows", content=ROWS)) == expected
    assert http_harness.everything()["datasets"] == []
    assert temporary_files(http_harness.settings) == []
