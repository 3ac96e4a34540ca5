"""A real API server on a loopback port, with keys for a provider and two owners, and without torch."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from safetensors.numpy import save_file

from post_server.api.app import create_app
from post_server.auth.keys import create_key
from post_server.db.database import Database
from post_server.db.tables import ApiKeyRow, Base, JobRow, ModelRow
from post_server.models.service import add_model
from post_server.settings import Settings
from post_server.storage.blob_store import BlobStore
from post_shared.errors import PROBLEM_MEDIA_TYPE
from post_shared.files.prompt_file import PromptFile, write_prompt
from post_shared.schemas.common import Role
from post_shared.schemas.models import ModelRole
from post_shared.schemas.tasks import TaskSpec
from tests.server.backing import temporary_files

WIDTH, LAYERS = 8, 4
TASK = TaskSpec(template="{text}, it was", label_words={"positive": ["good"], "negative": ["bad"]})
ROWS = b'{"text": "fine", "label": "positive"}\n{"text": "dull", "label": "negative"}\n'


class HttpHarness:
    """An API server with its database, store and clients; :meth:`close` stops it."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.settings = Settings(home=home, log_level="ERROR", **settings)
        self.database = Database.from_settings(self.settings)
        self.database.migrate()
        self.store = BlobStore.from_settings(self.settings)
        self.app = create_app(self.settings)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="critical", access_log=False))
        self._thread = threading.Thread(target=self._server.run, args=([self._listening],), daemon=True)
        self._thread.start()
        self.keys: dict[str, str] = {}
        self.key_ids: dict[str, str] = {}
        self._clients = {None: self._client(None)}
        for name, role in (("provider", Role.PROVIDER), ("alice", Role.OWNER), ("bob", Role.OWNER)):
            with self.database.write() as session:
                self.add_caller(name, *create_key(session, name=name, role=role))
        while not self._server.started:
            time.sleep(0.005)

    def add_caller(self, name: str, row: ApiKeyRow, text: str) -> None:
        """Let ``name`` make requests with this key."""
        self.key_ids[name], self.keys[name] = row.id, text
        self._clients[name] = self._client(name)

    def twin(self) -> HttpHarness:
        """Another API server on the same database and blobs, for the same callers."""
        other = HttpHarness(self.settings.home, **self.settings.model_dump(exclude={"home", "log_level"}))
        for name, text in self.keys.items():
            with self.database.read() as session:
                other.add_caller(name, session.get_one(ApiKeyRow, self.key_ids[name]), text)
        return other

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self._server.should_exit = True
        self._thread.join(10)
        self.database.dispose()

    def __call__(self, who: str | None, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request as ``who``; every error must be a problem document."""
        answer = self._clients[who].request(method, path, **options)
        if answer.status_code >= 400 and path != "/readyz":
            check_problem(answer)
        return answer

    def _client(self, name: str | None) -> httpx.Client:
        headers = {} if name is None else {"Authorization": f"Bearer {self.keys[name]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    # --- resources ------------------------------------------------------------------------------------

    def add_model(self, name: str, role: ModelRole = ModelRole.TARGET, target: ModelRow | None = None) -> ModelRow:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", "note": name}))
            weights = np.arange(WIDTH * 6, dtype=np.float32).reshape(6, WIDTH)
            save_file({"embed": weights}, Path(folder, "model.safetensors"))
            with self.database.write() as session:
                return add_model(
                    session,
                    self.store,
                    Path(folder),
                    name=name,
                    role=role,
                    target_id=None if target is None else target.id,
                    kind="causal",
                    architecture="LlamaForCausalLM",
                    layers=LAYERS if target is None else 2,
                    hidden_size=WIDTH,
                    vocabulary=6,
                    parameters=48,
                )

    def add_pair(self) -> tuple[ModelRow, ModelRow]:
        target = self.add_model("large")
        return target, self.add_model("small", ModelRole.STUDENT, target)

    def add_dataset(self, name: str = "public", content: bytes = ROWS, kind: str = "rows") -> str:
        answer = self("provider", "POST", "/v1/datasets", params={"name": name, "kind": kind}, content=content)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def push(self, who: str, data: bytes) -> httpx.Response:
        return self(who, "POST", "/v1/prompts", content=data, headers={"Content-Type": "application/octet-stream"})

    def everything(self) -> dict[str, Any]:
        """All rows except keys, and all blobs: a refused request must not change them."""
        tables = [table for table in Base.metadata.sorted_tables if table.name != "api_keys"]
        with self.database.read() as session:
            rows = {table.name: sorted(map(repr, session.execute(table.select()))) for table in tables}
        return {**rows, "blobs": self.store.list(), "temporary": temporary_files(self.settings)}

    def job(self, job_id: str) -> JobRow:
        with self.database.read() as session:
            return session.get_one(JobRow, job_id)


def prompt_bytes(model_hash: str, *, length: int = 3, width: int = WIDTH, seed: int = 0, dp: bool = False) -> bytes:
    """A prompt file with random vectors."""
    vectors = np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)
    return write_prompt(PromptFile(vectors, model_hash, TASK, *((8.0, 1e-5) if dp else (None, None))))


def check_problem(answer: httpx.Response) -> None:
    """Check an error: RFC 9457, a stable code, and the request id that the log has."""
    assert answer.headers["content-type"] == PROBLEM_MEDIA_TYPE, answer.text
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["type"] == f"urn:post:error:{problem['code']}"
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["title"]
    assert problem["detail"]
    assert "Traceback" not in answer.text


def code(answer: httpx.Response) -> tuple[int, str]:
    """Status and stable code of an error response."""
    return answer.status_code, answer.json()["code"]
