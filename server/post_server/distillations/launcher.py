"""Several processes that distil together: one leads, the others follow. Each takes its share of a step's rows.

The leader alone has the clock, the optimizer, the checkpoint and the reporter. In every step it sends the weights,
all compute gradients of their rows, and the sum comes back to it: the bytes of an all-reduce, with nothing to keep
in step.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from post_server.processes import parent_death
from post_shared.errors import InvalidInput, JobKilled
from post_shared.training.distributed import Group

READY = b"ready"
"""What a follower writes to its leader once it has its model."""


@contextmanager
def followers(order: Path, size: int, *, cpu: bool = False) -> Iterator[Group]:
    """Start ``size - 1`` processes that follow ``order`` (see :mod:`post_server.distillations.follower`), and lead them.

    Raises:
        InvalidInput: fewer than two processes.
        JobKilled: one of them ended before the work did.
    """
    if size < 2:
        raise InvalidInput("a leader needs at least one follower")
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size)}
    names |= {"LOCAL_WORLD_SIZE": str(size), "ACCELERATE_USE_CPU": str(cpu).lower()}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "post_server.distillations.follower", str(order)],
            env={**os.environ, **names, **_place(rank), **parent_death.environment_for_child()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        for rank in range(1, size)
    ]
    os.environ.update({**names, **_place(0)})
    try:
        for process in started:  # meeting one that has ended would take forever
            _await_ready(process)
        yield Group.join(cpu=cpu)
        with suppress(subprocess.TimeoutExpired):
            for process in started:  # they were let go by the end of the work
                process.wait(timeout=10)
    except RuntimeError as error:  # how a broken connection shows
        gone = [status for process in started if (status := _status(process))]
        if not gone:
            raise
        raise _ended(gone[0]) from error
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _await_ready(process: subprocess.Popen[bytes]) -> None:
    lines = iter(process.stdout or ())
    if not any(line.strip() == READY for line in lines):
        raise _ended(process.wait())


def _ended(status: int) -> JobKilled:
    return JobKilled(
        f"a process of the job on another GPU ended with {status}; see the worker's log", exit_status=status
    )


def _status(process: subprocess.Popen[bytes]) -> int | None:
    """How it ended; one that loses its connections first needs a moment."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=5)
    return None


def _place(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])
