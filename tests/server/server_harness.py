"""A harness for the tests of jobs and predictions: tiny stored models, and real processes to start and kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import redis
from sqlalchemy import select

from post_server.auth.keys import create_key
from post_server.db.database import Database
from post_server.db.tables import ApiKeyRow, DatasetRow, JobEventRow, JobRow, ModelRow, PromptRow
from post_server.jobs import states
from post_server.settings import Settings
from post_server.storage.blob_store import BlobStore
from post_shared.schemas.common import Role
from post_shared.schemas.datasets import DatasetKind
from post_shared.schemas.distillations import DistillationCreate
from post_shared.schemas.jobs import JobKind, JobState
from post_shared.schemas.models import ModelRole
from post_shared.schemas.prompts import PromptRole
from post_shared.schemas.tasks import TaskSpec
from tests.models import LABELS, TEXTS, tiny_model
from tests.server.backing import redis_command

T = TypeVar("T")

TASK = TaskSpec(
    template="{text}, it was",
    label_words={"positive": ["good", "great"], "negative": ["bad", "terrible"]},
)
PUBLIC = list(zip(TEXTS, LABELS, strict=True)) * 4


def wait_for(condition: Callable[[], T], seconds: float = 30.0, pause: float = 0.05) -> T:
    """The first true value that ``condition`` returns."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {seconds} s: {condition}")
        time.sleep(pause)
    return value


def environment(settings: Settings) -> dict[str, str]:
    """The environment of a process with these settings."""
    return os.environ | {f"POST_{name.upper()}": str(value) for name, value in settings.model_dump().items()}


class ServerHarness:
    """One server's database, store and processes; :meth:`close` kills everything that was started."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database.from_settings(settings)
        self.database.migrate()
        self.store = BlobStore.from_settings(settings)
        self._processes: list[subprocess.Popen[bytes]] = []
        with self.database.write() as session:
            self.provider = create_key(session, name="provider", role=Role.PROVIDER)[0]
            self.owner = create_key(session, name="owner", role=Role.OWNER)[0]

    # --- processes ------------------------------------------------------------------------------------

    def start(self, *argv: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        log = (self.settings.home / "test.log").open("ab")
        with log:
            process = subprocess.Popen(argv, stdout=log, stderr=log, env=env or environment(self.settings))
        self._processes.append(process)
        return process

    def start_redis(self) -> subprocess.Popen[bytes]:
        process = self.start(*redis_command(self.settings))
        wait_for(self._pings, 10.0, 0.01)
        return process

    def start_worker(self) -> subprocess.Popen[bytes]:
        return self.start(sys.executable, "-m", "post_server.worker")

    def start_predictor(self) -> subprocess.Popen[bytes]:
        return self.start(sys.executable, "-m", "post_server.predictor")

    def log(self) -> str:
        path = self.settings.home / "test.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                        each.send_signal(signal.SIGKILL)
            process.wait()
        self.database.dispose()

    def _pings(self) -> bool:
        try:
            with redis.Redis.from_url(self.settings.redis_url) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    # --- rows -----------------------------------------------------------------------------------------

    def add_target(self, *, name: str = "target", layers: int = 4, family: str = "llama") -> ModelRow:
        from post_server.models.service import add_model, model_facts

        model = tiny_model(family, layers=layers)
        folder = self.settings.home / f"{name}-saved"
        model.save(folder)
        with self.database.write() as session:
            return add_model(session, self.store, folder, name=name, role=ModelRole.TARGET, **model_facts(model))

    def add_rows(self, *, name: str = "public", rows: Sequence[tuple[str, str]] = PUBLIC) -> DatasetRow:
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        labels = sorted({label for _, label in rows})
        return self._add_dataset(name, DatasetKind.ROWS, "\n".join(lines), len(lines), labels)

    def add_corpus(self, *, name: str = "corpus", copies: int = 60) -> DatasetRow:
        text = "\n".join(f"{text}. {other}." for text in TEXTS for other in TEXTS for _ in range(copies // 8))
        return self._add_dataset(name, DatasetKind.CORPUS, text, text.count("\n") + 1, None)

    def add_source_prompt(self, student: ModelRow, *, length: int = 4, seed: int = 0) -> PromptRow:
        from post_server.prompts.service import add_prompt
        from post_shared.files.prompt_file import PromptFile, write_prompt

        vectors = np.random.default_rng(seed).normal(size=(length, student.hidden_size)).astype(np.float32)
        data = write_prompt(PromptFile(vectors, student.hash, TASK, 8.0, 1e-5))
        with self.database.write() as session:
            return add_prompt(session, self.store, data, role=PromptRole.SOURCE, owner_key_id=self.owner.id)[0]

    def _add_dataset(self, name: str, kind: DatasetKind, text: str, rows: int, labels: list[str] | None) -> DatasetRow:
        data = text.encode()
        row = DatasetRow(
            name=name, kind=kind, rows=rows, labels=labels, sha256=self.store.put(data), size_bytes=len(data)
        )
        with self.database.write() as session:
            session.add(row)
        return row

    def add_distil(self, *, steps: int, name: str = "student", **more: Any) -> str:
        """A distillation of the dataset ``corpus`` and the model ``target``; add those first."""
        request = {"target": "target", "name": name, "corpus": ["corpus"], "keep_layers": 2, "student_init": "copy"}
        small = {"steps": steps, "batch_tokens": 128, "sequence_length": 32}
        document = DistillationCreate.model_validate({**request, **small, **more})
        return self.add_job(JobKind.DISTIL, document.model_dump(mode="json"))

    def add_job(self, kind: JobKind, request: dict[str, Any], owner: ApiKeyRow | None = None) -> str:
        row = JobRow(kind=kind, request=request, owner_key_id=(owner or self.provider).id)
        with self.database.write() as session:
            states.announce(session, row)
        return row.id

    def job(self, job_id: str) -> JobRow:
        with self.database.read() as session:
            return session.get_one(JobRow, job_id)

    def events(self, job_id: str) -> list[JobEventRow]:
        with self.database.read() as session:
            statement = select(JobEventRow).where(JobEventRow.job_id == job_id)
            return list(session.scalars(statement.order_by(JobEventRow.sequence)))

    def ended(self, job_id: str, seconds: float = 60.0) -> JobRow:
        wait_for(lambda: self.job(job_id).state.ended, seconds)
        return self.job(job_id)

    def reaches(self, job_id: str, *, stage: str, progress: float = 0.0, seconds: float = 60.0) -> JobRow:
        """Wait until the running job reports that stage; an ended job is an error."""

        def reached() -> bool:
            row = self.job(job_id)
            assert not row.state.ended, (row.state, row.error, self.log())
            return row.state is JobState.RUNNING and row.stage == stage and row.progress >= progress

        wait_for(reached, seconds, 0.02)
        return self.job(job_id)


def job_processes(worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of a worker's jobs."""
    processes = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(worker.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # also raised for a zombie
                if "post_server.worker.job_process" in process.cmdline():
                    processes.append(process)
    return processes


def undisturbed_hash(server_harness: ServerHarness, job_id: str, folder: Path) -> str:
    """The hash of the student that a direct call with the same request makes."""
    from post_server.models.service import materialise_model
    from post_shared.data.rows import read_corpus
    from post_shared.files.model_folder import manifest, model_hash
    from post_shared.method.distillation.distil import distil
    from post_shared.method.distillation.teacher_cache import CacheBudget
    from post_shared.model.language_model import LanguageModel

    request = DistillationCreate.model_validate(server_harness.job(job_id).request)
    with server_harness.database.read() as session:
        target = session.scalars(select(ModelRow).where(ModelRow.name == "target")).one()
    model = LanguageModel.load(materialise_model(server_harness.store, target, folder / "target"), device="cpu")
    corpus = folder / "corpus.txt"
    corpus.write_bytes(b"".join(server_harness.store.open(server_harness.add_corpus(name="again").sha256)))
    options, cache_budget = request, CacheBudget(server_harness.settings.teacher_cache_bytes)
    distil(model, read_corpus(corpus), options, checkpoint=folder / "work", cache_budget=cache_budget).save(
        folder / "student"
    )
    return model_hash(manifest(folder / "student"))


def processes_in(folder: Path) -> list[psutil.Process]:
    """Every process whose POST_HOME is that folder, and the Redis server with its socket there."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            at_home = process.environ().get("POST_HOME") == str(folder)
            serves = f"unixsocket:{folder}/" in " ".join(process.cmdline())  # it overwrites its environment
            if (at_home or serves) and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes
