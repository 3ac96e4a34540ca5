"""A home folder of its own for each test of the server, with a migrated database."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from post_server.settings import Settings
from tests.server.backing import Backing, check_real_parts, real_backing
from tests.server.backstage import Backstage
from tests.server.front import Front
from tests.server.real_parts import ObjectStore, Postgres


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, since unix sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="post-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL for the whole run, started when a test first asks for it."""
    check_real_parts()
    part = Postgres()
    yield part
    part.close()


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """An S3 server for the whole run, which every process that is started hears of."""
    part = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in part.environment.items():
            patch.setenv(name, value)
        yield part
    part.close()


@pytest.fixture
def backing(request: pytest.FixtureRequest) -> Backing:
    """What the servers of a test stand on: see ``--backing``."""
    if request.config.getoption("--backing") == "embedded":
        return Backing()
    return real_backing(request.getfixturevalue("postgres"), request.getfixturevalue("object_store"))


@pytest.fixture
def backstage(home: Path, backing: Backing) -> Iterator[Backstage]:
    """Database, store and, on demand, real Redis, worker and predictor processes, with short leases."""
    settings = Settings(
        home=home,
        **backing.urls,
        lease_seconds=3.0,
        heartbeat_seconds=0.5,
        reconcile_seconds=0.3,
        ring_seconds=0.5,
        checkpoint_seconds=0.1,
        cancel_grace_seconds=10.0,
        stop_seconds=10.0,
        device="cpu",
        threads=1,
        job_nice=0,  # other tests run beside it
    )
    stage = Backstage(settings)
    yield stage
    stage.close()
    print(stage.log()[-10_000:])  # seen where the test failed


@pytest.fixture
def front(home: Path, backing: Backing) -> Iterator[Front]:
    """A real API server, without workers."""
    server = Front(home, **backing.urls)
    yield server
    server.close()


@pytest.fixture
def small_front(home: Path, backing: Backing) -> Iterator[Front]:
    """The same with limits that a test can reach."""
    limits = {"prompt_bytes": 4096, "dataset_bytes": 4096, "document_bytes": 4096, "jobs_per_key": 2}
    server = Front(home, **backing.urls, **limits)
    yield server
    server.close()


@pytest.fixture
def ready(backstage: Backstage) -> Backstage:
    """With a target model, a corpus and a broker: a distillation can be ordered."""
    backstage.add_target()
    backstage.add_corpus()
    backstage.start_redis()
    return backstage
