"""Several processes that work together on one job: one leads, the others follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import Tensor, distributed

_END = -1

_PATIENCE = timedelta(days=1)
"""Followers wait this long for the next step: the leader may search or save meanwhile. They die with it anyway."""


@dataclass(frozen=True)
class Group:
    """This process's place among those that work together. Tensors go through ``device``."""

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

    def call(self, step: int) -> None:
        """All work on ``step`` now."""
        if self.size > 1:
            self.tell([step])

    def end(self) -> None:
        """Let the followers go. A leader that fails says nothing: whoever started the processes ends them."""
        self.call(_END)

    # --- the followers' side ----------------------------------------------------------------------------

    def called(self) -> int | None:
        """The step to work on, or None at the end."""
        step = self.told(1)[0]
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

    def tell(self, numbers: Sequence[int]) -> None:
        """The leader's numbers, which the others get by :meth:`told`."""
        distributed.broadcast(torch.tensor(list(numbers), device=self.device), src=0)

    def told(self, count: int) -> list[int]:
        """The ``count`` numbers that the leader tells."""
        numbers = torch.empty(count, dtype=torch.int64, device=self.device)
        distributed.broadcast(numbers, src=0)
        return [int(number) for number in numbers]


ALONE = Group()
