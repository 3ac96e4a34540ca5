"""An API process with a Redis server and tiny models, without workers, for benchmarks of the API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
from safetensors.numpy import save_file

from post_server.auth.keys import create_key
from post_server.db.database import Database
from post_server.models.service import add_model
from post_server.serve import embedded_redis
from post_server.settings import Settings
from post_server.storage.blob_store import BlobStore
from post_shared.schemas.common import Role
from post_shared.schemas.models import ModelRole


class LiveApi:
    """A context manager; ``owner`` and ``provider`` are request headers with their keys."""

    def __init__(self, home: Path, *, width: int = 8, **settings: Any) -> None:
        unlimited = {"jobs_per_key": 10**6, "requests_per_minute": 0}
        self.settings = Settings.model_validate(
            {"home": home, "log_level": "ERROR", "port": _free_port(), **unlimited, **settings}
        )
        self.url = f"http://127.0.0.1:{self.settings.port}"
        self.database = Database.from_settings(self.settings)
        self.database.migrate()
        self.model_hash = self._add_models(width)
        self.owner_id, self.owner = self._key(Role.OWNER)
        _, self.provider = self._key(Role.PROVIDER)
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._start(*embedded_redis.command(embedded_redis.find_program(), self.settings.home / "redis.sock"))
        api = ("-m", "uvicorn", "--factory", "post_server.api.app:create_app", "--no-access-log")
        process = self._start(sys.executable, *api, "--port", str(self.settings.port), "--log-level", "error")
        self.pid = process.pid
        while process.poll() is None and not self._is_ready():
            time.sleep(0.05)
        if process.poll() is not None:
            raise SystemExit("the API process has ended; run it separately to see why")
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self.database.dispose()

    def _start(self, *argv: str) -> subprocess.Popen[bytes]:
        variables = {f"POST_{name.upper()}": str(value) for name, value in self.settings.model_dump().items()}
        process = subprocess.Popen(argv, env=os.environ | variables, stdout=subprocess.DEVNULL)
        self._processes.append(process)
        return process

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def _key(self, role: Role) -> tuple[str, dict[str, str]]:
        with self.database.write() as session:
            row, text = create_key(session, name=role.value, role=role)
        return row.id, {"Authorization": f"Bearer {text}"}

    def _add_models(self, width: int) -> str:
        """Add a target and its student; returns the student's hash."""
        target_id, digest = None, ""
        for name, role in (("large", ModelRole.TARGET), ("small", ModelRole.STUDENT)):
            with tempfile.TemporaryDirectory() as folder, self.database.write() as session:
                Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", "note": name}))
                save_file({"embed": np.zeros((6, width), np.float32)}, Path(folder, "model.safetensors"))
                facts = {"kind": "causal", "architecture": "LlamaForCausalLM", "layers": 4, "vocabulary": 6}
                store = BlobStore.from_settings(self.settings)
                row = add_model(
                    session,
                    store,
                    Path(folder),
                    name=name,
                    role=role,
                    target_id=target_id,
                    hidden_size=width,
                    parameters=6 * width,
                    **facts,  # type: ignore[arg-type]
                )
                target_id, digest = row.id, row.hash
        return digest


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
