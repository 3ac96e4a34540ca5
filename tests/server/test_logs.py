"""Log lines identify the request and the job, and never quote a text."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from io import StringIO
from typing import Any

import pytest
import structlog

from post_server.logs import configure_logs
from post_server.settings import Settings
from tests.server.http_harness import HttpHarness, prompt_bytes
from tests.server.server_harness import environment

SECRET = "my private review of a film"


def capture_logs(settings: Settings) -> StringIO:
    """Collects everything that is logged from now on."""
    configure_logs(settings)
    stream = StringIO()
    (handler,) = logging.getLogger("post").handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    return stream


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("kind", ["structlog", "library"])
def test_an_error_is_logged_by_location_and_class_only(home: Any, as_json: bool, kind: str) -> None:
    """Its message and that of its cause may quote a text, whichever logger is used."""
    stream = capture_logs(Settings(home=home, log_json=as_json))

    def fail() -> None:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise RuntimeError(SECRET) from error

    log: Any = structlog.get_logger("post.job") if kind == "structlog" else logging.getLogger("post.job")
    try:
        fail()
    except RuntimeError:
        log.exception("job failed")
    output = stream.getvalue()
    assert SECRET not in output
    for part in ("job failed", "in fail", "ValueError", "RuntimeError"):
        assert part in output


def test_the_lines_of_a_job_have_its_id_and_no_statement_parameters(home: Any) -> None:
    """In a process of its own, like a job's. The error is SQLAlchemy's, which by default quotes parameters."""
    code = f"""
import logging, structlog
from post_server.logs import configure_logs
from post_server.settings import Settings
from post_server.db.database import Database
from sqlalchemy import text
settings = Settings()
configure_logs(settings)
structlog.contextvars.bind_contextvars(job="job_1")
try:
    with Database.from_settings(settings).write() as session:
        session.execute(text("SELECT :x FROM nowhere"), {{"x": {SECRET!r}}})
except Exception as error:
    logging.getLogger("post.some.library").exception("failed: %s", error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment(Settings(home=home))
    )
    assert result.returncode == 0, result.stderr
    (line,) = map(json.loads, result.stderr.splitlines())
    assert line["job"] == "job_1"
    assert line["error"] == "OperationalError"
    assert "nowhere" in line["event"]
    assert SECRET not in result.stderr


def test_a_created_job_is_logged_with_its_request(http_harness: HttpHarness) -> None:
    target, student = http_harness.add_pair()
    http_harness.add_dataset()
    prompt = http_harness.push("alice", prompt_bytes(student.hash)).json()["id"]
    stream = capture_logs(http_harness.settings.model_copy(update={"log_level": "INFO"}))
    body = {"prompt": prompt, "target": target.id, "dataset": "public"}
    answer = http_harness("alice", "POST", "/v1/transfers", json=body)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    (line,) = [line for line in lines if line["event"] == "job queued"]
    assert (line["job"], line["kind"]) == (answer.json()["id"], "transfer")
    assert line["request_id"] == answer.headers["x-request-id"]
