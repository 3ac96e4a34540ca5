"""A target that is shared out to several processes, each on a GPU of its own (FSDP), and the prompt that they train.

Each holds its share of every layer, and gathers a layer's whole weights for the moment in which it runs them, on the
way back too. The prompt is everyone's: each process takes its share of a batch's rows, and all make the same step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from post_shared.data.batches import Batch
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import layers_of
from post_shared.model.memory_plan import saved_per_position
from post_shared.training.distributed import Group
from post_shared.training.optimizer import Loss, PromptAdam


def shard(model: LanguageModel, group: Group) -> LanguageModel:
    """Share the layers of ``model``, which was loaded on the CPU, out to the processes of ``group``, in place.

    All of them call this, and from then on run the same passes: one that is alone in a pass waits forever.

    Raises:
        InvalidInput: the model doesn't keep its layers in one list.
    """
    saved_per_position(model)  # remembered: of a shared model, gathered weights would be counted
    mesh = init_device_mesh(group.device.type, (group.size,))
    for layer in getattr(*layers_of(model)):
        fully_shard(layer, mesh=mesh)
    model.model.to(group.device)  # embeddings and head are everyone's
    return model


class SharedAdam(PromptAdam):
    """:class:`PromptAdam` on a prompt that all processes of a group hold, with the mean over all rows of a batch."""

    def __init__(
        self, prompt: nn.Parameter, learning_rate: float, split: Callable[[Batch], list[Batch]], group: Group
    ) -> None:
        """``split`` is the same in every process."""
        super().__init__(prompt, learning_rate, split)
        self.group = group

    def update(self, loss: Loss, batch: Batch) -> float:
        self.optimizer.zero_grad()
        ranks = range(self.group.size)
        shares = [self.split(batch.part(range(rank, len(batch), self.group.size))) for rank in ranks]
        mine, sums = shares[self.group.rank], torch.zeros(2, device=self.prompt.device)
        for at in range(max(map(len, shares))):  # all run as many passes: without rows, a process repeats one in vain
            part, weight = (mine[at], 1.0) if at < len(mine) else (batch.part([0]), 0.0)
            losses = loss(self.prompt, part)
            (weight * losses.sum()).backward()  # type: ignore[no-untyped-call]
            sums += weight * torch.stack([losses.detach().sum(), torch.tensor(float(len(losses)), device=sums.device)])
        gradient = torch.zeros_like(self.prompt) if self.prompt.grad is None else self.prompt.grad
        self.group.sum([gradient, sums])
        self.prompt.grad = gradient / sums[1]
        self.optimizer.step()
        return float(sums[0] / sums[1])
