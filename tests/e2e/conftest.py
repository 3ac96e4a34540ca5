"""A provider's machine with a running ``post serve``, for the command-line tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models import LABELS, TEXTS, tiny_model
from tests.server.server_harness import wait_for


class Machine:
    """A machine: a folder, an environment, and the ``post`` command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stderr = folder, ""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("POST_")}
        self.environment = inherited | {"POST_HOME": str(folder / "home"), "POST_PORT": "0", "POST_DEVICE": "cpu"}
        # Other tests run at the same time, so jobs keep their normal priority.
        self.environment |= {"POST_LEDGER": str(folder / "ledger.db"), "POST_JOB_NICE": "0"}

    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "post_shared.cli.app", *map(str, arguments)]

    def post(self, *arguments: object) -> str:
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=200,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        self.stderr = done.stderr
        return done.stdout.strip()

    def json(self, *arguments: object) -> Any:
        return json.loads(self.post(*arguments, "--json"))


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A machine whose ``post serve`` has a tiny model, public data, and a provider's key."""
    with tempfile.TemporaryDirectory(prefix="post-") as name:
        machine = Machine(Path(name))
        (machine.folder / "home").mkdir()
        tiny_model("llama", layers=4).save(machine.folder / "large")
        rows = [json.dumps({"text": text, "label": label}) for text, label in zip(TEXTS, LABELS, strict=True)] * 4
        (machine.folder / "rows.jsonl").write_text("\n".join(rows))
        (machine.folder / "corpus.txt").write_text("\n".join(f"{a}. {b}." for a in TEXTS for b in TEXTS))
        machine.post("model", "add", "large", "--name", "large")
        machine.post("dataset", "add", "rows.jsonl", "--name", "public")
        machine.post("dataset", "add", "corpus.txt", "--name", "prose")
        key = machine.post("key", "create", "--role", "provider", "--name", "me").splitlines()[-1]
        with (machine.folder / "log").open("wb") as log:
            server = subprocess.Popen(machine.command("serve"), env=machine.environment, stdout=log, stderr=log)
        try:
            ready = machine.folder / "home" / "serve.json"
            wait_for(ready.exists, 120)
            machine.environment |= {"POST_URL": json.loads(ready.read_text())["url"], "POST_API_KEY": key}
            yield machine
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
