"""The services behind a test's server: embedded ones, or real ones with ``--backing real``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from post_server.serve import embedded_redis
from post_server.settings import Settings
from tests.server.external_services import ObjectStore, Postgres, free_port, missing_programs


@dataclass(frozen=True)
class Backing:
    """Settings with the URLs of the services; none for the embedded ones, which use the home folder."""

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


def skip_or_fail(missing: list[str], purpose: str) -> None:
    """Skip on a machine that lacks a program; fail in CI, which installs them."""
    if missing:
        reason = f"{purpose} needs {', '.join(missing)}, which isn't installed; .ci/run installs it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def check_external_services() -> None:
    """Skip, or fail in CI, if a real service isn't installed."""
    skip_or_fail(missing_programs(), "--backing real")


def temporary_files(settings: Settings) -> list[Path]:
    """The unfinished files of the store."""
    embedded = settings.storage_url.startswith("file://")
    folder = settings.home / ("blobs" if embedded else "cache/blobs") / "tmp"
    return list(folder.iterdir())
