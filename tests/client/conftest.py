"""A real API server without workers, its clients, and a local student."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from post_client import Client
from tests.models import tiny_model
from tests.server.http_harness import HttpHarness


@pytest.fixture
def http_harness() -> Iterator[HttpHarness]:
    """A real API server on a loopback port."""
    with tempfile.TemporaryDirectory(prefix="post-") as folder:
        server = HttpHarness(Path(folder))
        yield server
        server.close()


@pytest.fixture
def owner(http_harness: HttpHarness) -> Iterator[Client]:
    with Client(url=http_harness.url, api_key=http_harness.keys["alice"]) as client:
        yield client


@pytest.fixture
def provider(http_harness: HttpHarness) -> Iterator[Client]:
    with Client(url=http_harness.url, api_key=http_harness.keys["provider"]) as client:
        yield client


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny student, which tests must not change."""
    folder = tmp_path_factory.mktemp("models") / "student"
    tiny_model("llama", layers=2).save(folder)
    return folder
