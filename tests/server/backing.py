"""What a test's server stands on: the embedded parts, or with ``--backing real`` the real ones."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from post_server.serve import embedded_redis
from post_server.settings import Settings
from tests.server.external_services import ObjectStore, Postgres, free_port, missing_parts


@dataclass(frozen=True)
class Backing:
    """Settings that name the parts; none for the embedded ones, which lie in the home folder."""

    urls: dict[str, str] = field(default_factory=dict)


def real_backing(postgres: Postgres, object_store: ObjectStore) -> Backing:
    """An empty database, a new bucket and a port for Redis, for one test."""
    postgres.empty(postgres.shared_database)
    redis = f"redis://:secret@{postgres.address}:{free_port(postgres.address)}/0"
    urls = {"database_url": postgres.shared_database, "redis_url": redis, "storage_url": object_store.new_bucket()}
    return Backing(urls)


def redis_command(settings: Settings) -> list[str]:
    """The command line of the Redis server that the settings name."""
    if embedded_redis.is_embedded(settings):
        return embedded_redis.command(embedded_redis.find_program(), settings.home / "redis.sock")
    address, port = settings.redis_url.split("@")[1].split("/")[0].split(":")
    options = {"bind": address, "port": port, "requirepass": "secret", "save": "", "dir": str(settings.home)}
    return ["redis-server", *(part for name, value in options.items() for part in (f"--{name}", value))]


def skip_or_fail(missing: list[str], why: str) -> None:
    """A machine of one's own may lack a program; CI, which installs them, may not."""
    if missing:
        reason = f"{why} needs {', '.join(missing)}, which isn't there; .ci/run installs it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def check_real_parts() -> None:
    """Skip, or fail in CI, where a real part is missing."""
    skip_or_fail(missing_parts(), "--backing real")


def temporary_files(settings: Settings) -> list[Path]:
    """What the store has left half-way."""
    embedded = settings.storage_url.startswith("file://")
    folder = settings.home / ("blobs" if embedded else "cache/blobs") / "tmp"
    return list(folder.iterdir())
