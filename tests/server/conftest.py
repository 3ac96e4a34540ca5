"""Gives each server test its own home folder with a migrated database."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from post_server.settings import Settings
from tests.server.backing import Backing, check_external_services, real_backing
from tests.server.external_services import ObjectStore, Postgres
from tests.server.http_harness import HttpHarness
from tests.server.server_harness import ServerHarness


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, since it contains unix sockets."""
    with tempfile.TemporaryDirectory(prefix="post-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL for the whole run, started for the first test that uses it."""
    check_external_services()
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """An S3 server for the whole run; its address is in the environment of every started process."""
    server = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    server.close()


@pytest.fixture
def backing(request: pytest.FixtureRequest) -> Backing:
    """The services behind a test's servers: see ``--backing``."""
    if request.config.getoption("--backing") == "embedded":
        return Backing()
    return real_backing(request.getfixturevalue("postgres"), request.getfixturevalue("object_store"))


@pytest.fixture
def server_harness(home: Path, backing: Backing) -> Iterator[ServerHarness]:
    """Database, store and, on demand, real Redis, worker and predictor processes, with short leases."""
    settings = Settings(
        home=home,
        **backing.urls,
        lease_seconds=3.0,
        heartbeat_seconds=0.5,
        reconcile_seconds=0.3,
        notify_seconds=0.5,
        checkpoint_seconds=0.1,
        cancel_grace_seconds=10.0,
        stop_seconds=10.0,
        device="cpu",
        threads=1,
        job_nice=0,  # other tests run beside it
    )
    harness = ServerHarness(settings)
    yield harness
    harness.close()
    print(harness.log()[-10_000:])  # shown if the test failed


@pytest.fixture
def http_harness(home: Path, backing: Backing) -> Iterator[HttpHarness]:
    """A real API server, without workers."""
    server = HttpHarness(home, **backing.urls)
    yield server
    server.close()


@pytest.fixture
def limited_http_harness(home: Path, backing: Backing) -> Iterator[HttpHarness]:
    """The same with limits small enough to reach in a test."""
    limits = {"prompt_bytes": 4096, "dataset_bytes": 4096, "document_bytes": 4096, "jobs_per_key": 2}
    server = HttpHarness(home, **backing.urls, **limits)
    yield server
    server.close()


@pytest.fixture
def ready(server_harness: ServerHarness) -> ServerHarness:
    """With a target model, a corpus and a broker, so that a distillation can be created."""
    server_harness.add_target()
    server_harness.add_corpus()
    server_harness.start_redis()
    return server_harness
