"""A home folder of its own for each test of the server, with a migrated database."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from post_server.settings import Settings
from tests.server.backstage import Backstage
from tests.server.front import Front


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, since unix sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="post-") as folder:
        yield Path(folder)


@pytest.fixture
def backstage(home: Path) -> Iterator[Backstage]:
    """Database, store and, on demand, real Redis, worker and predictor processes, with short leases."""
    settings = Settings(
        home=home,
        lease_seconds=3.0,
        heartbeat_seconds=0.5,
        reconcile_seconds=0.3,
        ring_seconds=0.5,
        checkpoint_seconds=0.1,
        cancel_grace_seconds=10.0,
        stop_seconds=10.0,
        device="cpu",
        threads=1,
    )
    stage = Backstage(settings)
    yield stage
    stage.close()


@pytest.fixture
def front(home: Path) -> Iterator[Front]:
    """A real API server, without workers."""
    server = Front(home)
    yield server
    server.close()


@pytest.fixture
def small_front(home: Path) -> Iterator[Front]:
    """The same with limits that a test can reach."""
    server = Front(home, prompt_bytes=4096, dataset_bytes=4096, document_bytes=4096, jobs_per_key=2)
    yield server
    server.close()
