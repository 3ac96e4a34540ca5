"""Schemathesis against a live server: every check, every phase, links from one operation to the next.

No answer is a defect (5xx), and none is one that the OpenAPI document doesn't describe.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from post_server.auth.keys import create_key
from post_server.settings import Settings
from post_shared.schemas.common import Role
from tests.server.server_harness import TASK, ServerHarness, wait_for

CONFIGURATION = """
hooks = "hooks.py"

[checks.positive_data_acceptance]
# Whether names fit together, a task can be used or an Idempotency-Key is fresh, no schema can say.
expected-statuses = ["2xx", 304, 403, 404, 409, 413, 416, 422]
"""

HOOKS = """
import schemathesis


@schemathesis.hook
def before_call(context, case, kwargs):
    # A replayed create names what an earlier one made, which may have been removed since. Its links would find nothing.
    if case.meta is not None and case.meta.phase.name.value == "stateful":
        case.headers.pop("Idempotency-Key", None)
"""


@pytest.fixture
def live(home: Path) -> Iterator[tuple[str, str, ServerHarness]]:
    """Address and a provider's key of an API process with Redis and a predictor; things to name are there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    many = {"jobs_per_key": 1_000_000, "requests_per_minute": 1_000_000}
    settings = Settings(home=home, port=port, device="cpu", threads=1, log_level="WARNING", **many)
    stage = ServerHarness(settings)
    with stage.database.write() as session:
        _, key = create_key(session, name="tester", role=Role.PROVIDER)
    try:
        stage.start_redis()
        stage.start(
            *(sys.executable, "-m", "uvicorn", "--factory", "post_server.api.app:create_app"),
            *("--port", str(port), "--log-level", "warning", "--no-access-log"),
        )
        stage.add_source_prompt(stage.add_target(name="large"))
        stage.add_rows()
        stage.start_predictor()
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: _answers(url, key), 60.0, 0.2)
        yield url, key, stage
    finally:
        stage.close()


def _answers(url: str, key: str) -> bool:
    """Whether it answers, the predictor too."""
    question = {"model": "large", "task": TASK.model_dump(), "texts": ["x"]}
    headers = {"Authorization": f"Bearer {key}"}
    try:
        return httpx.post(f"{url}/v1/predictions", json=question, headers=headers, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def check(live: tuple[str, str, ServerHarness], folder: Path, *options: str) -> None:
    """Run it. Raises with its whole report when a check fails."""
    url, key, stage = live
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    (folder / "hooks.py").write_text(HOOKS)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "all"]
    headers = ["--header", f"Authorization: Bearer {key}"]
    quiet = ["--no-color", "--no-shrink", "--suppress-health-check", "all", "--warnings", "off"]
    done = subprocess.run(
        [*command, *headers, *quiet, "--request-timeout", "30", "--seed", "7", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:] + stage.log()[-5000:]
    assert "Stateful" in done.stdout, done.stdout  # all phases ran


def test_no_answer_is_a_defect_or_undocumented(live: tuple[str, str, ServerHarness], tmp_path: Path) -> None:
    check(live, tmp_path, "--phases", "coverage,fuzzing,stateful", "--max-examples", "2", "--max-time", "20")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_answer_is_a_defect_or_undocumented_among_many(live: tuple[str, str, ServerHarness], tmp_path: Path) -> None:
    check(live, tmp_path, "--max-examples", "100", "--max-time", "180")
