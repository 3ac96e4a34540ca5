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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, distributed

from post_server.ml.corpus import Corpus, corpus_of
from post_server.worker import lifeline
from post_shared.errors import InvalidInput, JobKilled
from post_shared.language_model import LanguageModel

READY = b"ready"
"""What a follower writes to its leader once it has its model."""
_END = -1
_PATIENCE = timedelta(days=1)
"""Followers wait this long for the next step: the leader may search or save meanwhile. They die with it anyway."""


@dataclass(frozen=True)
class Group:
    """This process's place among those that distil together. Tensors go through ``device``."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable

    @classmethod
    def join(cls, *, cpu: bool = False) -> Group:
        """Meet the other processes, as ``accelerate launch`` or :func:`followers` named them in the environment."""
        state = PartialState(cpu=cpu, timeout=_PATIENCE)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # --- the leader's side ------------------------------------------------------------------------------

    def begin(self, corpus: Corpus, kept: Sequence[int], accumulate: int) -> None:
        """Tell the followers what the work is about, and in how many parts each takes its share."""
        if self.size > 1:
            count, length = corpus.blocks.shape
            self._tell([count, length, len(kept), accumulate])
            self._tell(kept)
            self.share([torch.from_numpy(corpus.blocks)])

    def call(self, step: int) -> None:
        """All work on ``step`` now."""
        if self.size > 1:
            self._tell([step])

    def end(self) -> None:
        """Let the followers go. A leader that fails says nothing: whoever started the processes ends them."""
        self.call(_END)

    # --- the followers' side ----------------------------------------------------------------------------

    def begun(self, target: LanguageModel, *, answers: bool) -> tuple[Corpus, list[int], int]:
        """What :meth:`begin` told: the corpus, the kept layers, and the parts."""
        count, length, layers, accumulate = self._told(4)
        kept = self._told(layers)
        blocks = torch.empty(count, length, dtype=torch.int32)
        self.share([blocks])
        return corpus_of(target, blocks.numpy().astype(np.int32), answers=answers), kept, accumulate

    def called(self) -> int | None:
        """The step to work on, or None at the end."""
        step = self._told(1)[0]
        return None if step == _END else step

    # --- both -------------------------------------------------------------------------------------------

    def share(self, tensors: Iterable[Tensor]) -> None:
        """The leader's values become everyone's, in place."""
        for tensor in tensors if self.size > 1 else ():
            held = tensor.detach().to(self.device)
            distributed.broadcast(held, src=0)
            if not self.leads and held.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(held)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """The sum over all processes comes to be the leader's, in place."""
        for tensor in tensors if self.size > 1 else ():
            held = tensor.detach().to(self.device)
            distributed.reduce(held, dst=0)
            if self.leads and held.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(held)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """The sum over all processes comes to be everyone's, in place; the tensors are on the group's device."""
        for tensor in tensors if self.size > 1 else ():
            distributed.all_reduce(tensor.detach())

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        held = torch.tensor(number, device=self.device)
        if self.size > 1:
            distributed.all_reduce(held, distributed.ReduceOp.MIN)
        return int(held)

    def _tell(self, numbers: Sequence[int]) -> None:
        distributed.broadcast(torch.tensor(list(numbers), device=self.device), src=0)

    def _told(self, count: int) -> list[int]:
        numbers = torch.empty(count, dtype=torch.int64, device=self.device)
        distributed.broadcast(numbers, src=0)
        return [int(number) for number in numbers]


ALONE = Group()


@contextmanager
def followers(order: Path, size: int, *, cpu: bool = False) -> Iterator[Group]:
    """Start ``size - 1`` processes that follow ``order`` (see :mod:`post_server.ml.follower`), and lead them.

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
            [sys.executable, "-m", "post_server.ml.follower", str(order)],
            env={**os.environ, **names, **_place(rank), **lifeline.environment_for_child()},
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
