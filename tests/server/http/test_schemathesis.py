"""Schemathesis against a live server: all checks and phases, with links between operations.

No response is a server error (5xx), and every response is described by the OpenAPI document.
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
# A schema can't express whether names exist, a task is valid or an Idempotency-Key is new.
expected-statuses = ["2xx", 304, 403, 404, 409, 413, 416, 422]
"""

HOOKS = """
import schemathesis


@schemathesis.hook
def before_call(context, case, kwargs):
    # A replayed response may name an object that has been deleted since. Its links would find nothing.
    if case.meta is not None and case.meta.phase.name.value == "stateful":
        case.headers.pop("Idempotency-Key", None)
"""


@pytest.fixture
def live(home: Path) -> Iterator[tuple[str, str, ServerHarness]]:
    """URL and a provider's key of an API process with Redis, a predictor and some stored objects."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    many = {"jobs_per_key": 1_000_000, "requests_per_minute": 1_000_000}
    settings = Settings(home=home, port=port, device="cpu", threads=1, log_level="WARNING", **many)
    harness = ServerHarness(settings)
    with harness.database.write() as session:
        _, key = create_key(session, name="tester", role=Role.PROVIDER)
    try:
        harness.start_redis()
        harness.start(
            *(sys.executable, "-m", "uvicorn", "--factory", "post_server.api.app:create_app"),
            *("--port", str(port), "--log-level", "warning", "--no-access-log"),
        )
        harness.add_source_prompt(harness.add_target(name="large"))
        harness.add_rows()
        harness.start_predictor()
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: _answers(url, key), 60.0, 0.2)
        yield url, key, harness
    finally:
        harness.close()


def _answers(url: str, key: str) -> bool:
    """Whether the API and the predictor are ready."""
    body = {"model": "large", "task": TASK.model_dump(), "texts": ["x"]}
    headers = {"Authorization": f"Bearer {key}"}
    try:
        return httpx.post(f"{url}/v1/predictions", json=body, headers=headers, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def check(live: tuple[str, str, ServerHarness], folder: Path, *options: str) -> None:
    """Run Schemathesis; a failed check shows its whole report."""
    url, key, harness = live
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
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:] + harness.log()[-5000:]
    assert "Stateful" in done.stdout, done.stdout  # all phases ran


def test_no_response_is_a_server_error_or_undocumented(live: tuple[str, str, ServerHarness], tmp_path: Path) -> None:
    check(live, tmp_path, "--phases", "coverage,fuzzing,stateful", "--max-examples", "2", "--max-time", "20")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_response_of_many_is_a_server_error_or_undocumented(
    live: tuple[str, str, ServerHarness], tmp_path: Path
) -> None:
    check(live, tmp_path, "--max-examples", "100", "--max-time", "180")
