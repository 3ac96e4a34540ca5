"""Data-parallel distillation: one leader process and its followers, each with a share of a step's rows.

Only the leader has the schedule, the optimizer, the checkpoint and the progress callback. In every step it sends the
weights, all processes compute the gradients of their rows, and the leader receives the sum. That moves as many bytes
as an all-reduce, and no state has to be kept in sync.
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
"""A follower writes this line to the leader once it has loaded its model."""


@contextmanager
def followers(config: Path, size: int, *, cpu: bool = False) -> Iterator[Group]:
    """Start ``size - 1`` followers with the configuration ``config`` (see :mod:`post_server.distillations.follower`).

    Raises:
        InvalidInput: fewer than two processes.
        JobKilled: a follower ended before the distillation did.
    """
    if size < 2:
        raise InvalidInput("a leader needs at least one follower")
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size)}
    variables |= {"LOCAL_WORLD_SIZE": str(size), "ACCELERATE_USE_CPU": str(cpu).lower()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "post_server.distillations.follower", str(config)],
            env={**os.environ, **variables, **_rank_variables(rank), **parent_death.environment_for_child()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        for rank in range(1, size)
    ]
    os.environ.update({**variables, **_rank_variables(0)})
    try:
        for process in processes:  # joining a group with an ended process would block forever
            _await_ready(process)
        yield Group.join(cpu=cpu)
        with suppress(subprocess.TimeoutExpired):
            for process in processes:  # the end of the distillation has released them
                process.wait(timeout=10)
    except RuntimeError as error:  # what a broken connection raises
        statuses = [status for process in processes if (status := _exit_status(process))]
        if not statuses:
            raise
        raise _ended(statuses[0]) from error
    finally:
        for process in processes:
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


def _exit_status(process: subprocess.Popen[bytes]) -> int | None:
    """The exit status, if the process ends soon: it may lose its connections before it ends."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=5)
    return None


def _rank_variables(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
