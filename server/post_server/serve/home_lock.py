"""The home folder: private, and used by one server at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from post_shared.errors import Unavailable
from post_shared.files.atomic import replacing

READY_FILE = "serve.json"
_LOCK_FILE = "serve.lock"


@contextmanager
def locked_home(home: Path) -> Iterator[Path]:
    """Create the folder (readable by its owner only) and lock it for this process.

    Raises:
        Unavailable: it can't be written, or another ``post serve`` has locked it.
    """
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(home / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(
            f"the home folder {home} can't be used: {error.strerror}; choose another with POST_HOME"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Unavailable(
                f"another post serve is running in {home}{_running(home)}; stop it or choose another POST_HOME"
            ) from error
        (home / READY_FILE).unlink(missing_ok=True)
        yield home
        (home / READY_FILE).unlink(missing_ok=True)
    finally:
        os.close(lock)


def _running(home: Path) -> str:
    try:
        server = json.loads((home / READY_FILE).read_text("utf-8"))
        return f" (process {server['pid']}, {server['url']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def announce(home: Path, url: str) -> None:
    """Write ``serve.json`` atomically: whoever reads it finds a server that answers."""
    with replacing(home / READY_FILE) as partial:
        partial.write_text(json.dumps({"url": url, "pid": os.getpid()}), "utf-8")
