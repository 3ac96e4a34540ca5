"""A group of processes that work on one job: rank 0 leads, the others follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import Tensor, distributed

_END = -1

_TIMEOUT = timedelta(days=1)
"""How long followers wait for the next step: the leader may search or save meanwhile. They end with it anyway."""


@dataclass(frozen=True)
class Group:
    """This process's rank in the group. Collective operations use tensors on ``device``."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable

    @classmethod
    def join(cls, *, cpu: bool = False) -> Group:
        """Join the group that ``accelerate launch`` or the leader's launcher describes in the environment."""
        state = PartialState(cpu=cpu, timeout=_TIMEOUT)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # --- the leader's side ------------------------------------------------------------------------------

    def announce(self, step: int) -> None:
        """Start ``step`` on all followers."""
        if self.size > 1:
            self.send([step])

    def end(self) -> None:
        """Let the followers return. A leader that fails doesn't call this: the launcher ends the processes."""
        self.announce(_END)

    # --- the followers' side ----------------------------------------------------------------------------

    def next_step(self) -> int | None:
        """The step that the leader announces, or None at the end."""
        step = self.receive(1)[0]
        return None if step == _END else step

    # --- both -------------------------------------------------------------------------------------------

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the leader's values to all processes, in place."""
        for tensor in tensors if self.size > 1 else ():
            value = tensor.detach().to(self.device)
            distributed.broadcast(value, src=0)
            if not self.leads and value.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(value)

    def reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sum over all processes, in the leader's tensors, in place."""
        for tensor in tensors if self.size > 1 else ():
            value = tensor.detach().to(self.device)
            distributed.reduce(value, dst=0)
            if self.leads and value.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(value)

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sum over all processes, in the tensors of each, in place; they are on the group's device."""
        for tensor in tensors if self.size > 1 else ():
            distributed.all_reduce(tensor.detach())

    def min(self, number: int) -> int:
        """The minimum of the processes' numbers."""
        value = torch.tensor(number, device=self.device)
        if self.size > 1:
            distributed.all_reduce(value, distributed.ReduceOp.MIN)
        return int(value)

    def send(self, numbers: Sequence[int]) -> None:
        """Send the leader's numbers to the followers, who call :meth:`receive`."""
        distributed.broadcast(torch.tensor(list(numbers), device=self.device), src=0)

    def receive(self, count: int) -> list[int]:
        """The ``count`` numbers that the leader sends."""
        numbers = torch.empty(count, dtype=torch.int64, device=self.device)
        distributed.broadcast(numbers, src=0)
        return [int(number) for number in numbers]


ALONE = Group()
