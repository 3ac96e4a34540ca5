"""What is logged helps to find a mistake, by request and by job, and quotes nothing."""

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


def logged(settings: Settings) -> StringIO:
    """Everything that is logged from now on."""
    configure_logs(settings)
    stream = StringIO()
    (handler,) = logging.getLogger("post").handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    return stream


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("kind", ["structlog", "library"])
def test_an_error_is_told_by_place_and_class_alone(home: Any, as_json: bool, kind: str) -> None:
    """Its own message and that of its cause may quote a text; whoever logs it."""
    stream = logged(Settings(home=home, log_json=as_json))

    def defect() -> None:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise RuntimeError(SECRET) from error

    log: Any = structlog.get_logger("post.job") if kind == "structlog" else logging.getLogger("post.job")
    try:
        defect()
    except RuntimeError:
        log.exception("job failed")
    written = stream.getvalue()
    assert SECRET not in written
    for part in ("job failed", "in defect", "ValueError", "RuntimeError"):
        assert part in written


def test_a_jobs_lines_carry_its_id_and_no_value_of_a_statement(home: Any) -> None:
    """In a process of its own, as a job has one; the error is the database's, which likes to quote its parameters."""
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
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment(Settings(home=home))
    )
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, done.stderr.splitlines())
    assert line["job"] == "job_1"
    assert line["error"] == "OperationalError"
    assert "nowhere" in line["event"]
    assert SECRET not in done.stderr


def test_an_order_ties_its_job_to_its_request(http_harness: HttpHarness) -> None:
    target, student = http_harness.add_pair()
    http_harness.add_dataset()
    prompt = http_harness.push("alice", prompt_bytes(student.hash)).json()["id"]
    stream = logged(http_harness.settings.model_copy(update={"log_level": "INFO"}))
    order = {"prompt": prompt, "target": target.id, "dataset": "public"}
    answer = http_harness("alice", "POST", "/v1/transfers", json=order)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    (line,) = [line for line in lines if line["event"] == "job queued"]
    assert (line["job"], line["kind"]) == (answer.json()["id"], "transfer")
    assert line["request_id"] == answer.headers["x-request-id"]
