"""The provider's side of the demo, in child processes. Both sides share nothing but HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from post_shared.errors import Unavailable
from post_shared.schemas.common import Role

START_SECONDS, STOP_SECONDS = 120.0, 30.0
PASSED_VARIABLES = ("POST_CACHE", "POST_DEVICE", "POST_THREADS")
"""The only settings that the demo's provider inherits: never a real database or broker."""


class DemoProvider:
    """A provider in a folder. ``serving`` runs its server; the other methods change its store."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = home / "serve.log"
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("POST_") or name in PASSED_VARIABLES
        } | {"POST_HOME": str(home), "POST_PORT": "0", "POST_HOST": "127.0.0.1", "POST_LOG_JSON": "false"}

    def create_key(self, role: Role) -> str:
        """Create an API key and return it."""
        return self._post("key", "create", "--role", str(role), "--name", f"demo-{role}").strip().splitlines()[-1]

    def add_model(self, source: Path, name: str) -> None:
        """``post model add``"""
        self._post("model", "add", str(source), "--name", name)

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Run ``post serve`` on a free loopback port; yields its address and stops it at the end."""
        with self.log.open("ab") as log:
            server = subprocess.Popen(
                [*_command(), "serve"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # so Ctrl-C reaches only this process, which stops the server
            )
        try:
            yield self._address(server)
        finally:
            _stop(server)

    def last_lines(self, count: int = 15) -> str:
        """The last lines of the logs of the server and its processes; the worker's log has a failed job's cause."""
        last_lines = []
        for log in (self.log, *sorted((self.home / "logs").glob("*.log"))):
            lines = log.read_text("utf-8", "replace").splitlines()[-count:] if log.is_file() else []
            last_lines += [f"{log.name}: {line}" for line in lines]
        return "\n".join(last_lines)

    def _address(self, server: subprocess.Popen[bytes]) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise Unavailable(f"post serve exited with code {server.returncode}; see its log: {self.log}")
            try:
                return str(json.loads((self.home / "serve.json").read_text("utf-8"))["url"])
            except (OSError, ValueError, KeyError):
                time.sleep(0.1)
        raise Unavailable(f"post serve wasn't ready after {START_SECONDS:.0f} s; see its log: {self.log}")

    def _post(self, *arguments: str) -> str:
        done = subprocess.run(
            [*_command(), *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        with self.log.open("a", encoding="utf-8") as log:
            log.write(done.stderr)
        if done.returncode != 0:
            last_line = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise Unavailable(f"post {' '.join(arguments[:2])} failed: {last_line[0]}")
        return done.stdout


def _command() -> list[str]:
    return [sys.executable, "-m", "post_shared.cli.app"]


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is not None:
        return
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
