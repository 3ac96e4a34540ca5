"""A target sharded over several processes, each on its own GPU (FSDP), and the optimizer of the prompt that they train.

Each process holds a shard of every layer and gathers the whole weights while the layer runs, forward and backward. The
prompt is replicated: each process computes gradients for its share of a batch's rows, and all make the same step.
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
    """Shard the layers of ``model``, which was loaded on the CPU, over the processes of ``group``, in place.

    All of them call this and from then on run the same passes: a pass that one process runs alone never ends.

    Raises:
        InvalidInput: the model doesn't keep its layers in one list.
    """
    saved_per_position(model)  # cached now: in a sharded model, gathered weights would be counted too
    mesh = init_device_mesh(group.device.type, (group.size,))
    for layer in getattr(*layers_of(model)):
        fully_shard(layer, mesh=mesh)
    model.model.to(group.device)  # embeddings and head are replicated
    return model


class SharedAdam(PromptAdam):
    """:class:`PromptAdam` on a prompt that is replicated over a group; losses are the mean over all rows of a batch."""

    def __init__(
        self, prompt: nn.Parameter, learning_rate: float, split: Callable[[Batch], list[Batch]], group: Group
    ) -> None:
        """``split`` must be the same in every process."""
        super().__init__(prompt, learning_rate, split)
        self.group = group

    def update(self, loss: Loss, batch: Batch) -> float:
        self.optimizer.zero_grad()
        ranks = range(self.group.size)
        shares = [self.split(batch.part(range(rank, len(batch), self.group.size))) for rank in ranks]
        own, sums = shares[self.group.rank], torch.zeros(2, device=self.prompt.device)
        for index in range(max(map(len, shares))):  # all run the same number of passes: one without rows repeats a row
            part, weight = (own[index], 1.0) if index < len(own) else (batch.part([0]), 0.0)
            losses = loss(self.prompt, part)
            (weight * losses.sum()).backward()  # type: ignore[no-untyped-call]
            sums += weight * torch.stack([losses.detach().sum(), torch.tensor(float(len(losses)), device=sums.device)])
        gradient = torch.zeros_like(self.prompt) if self.prompt.grad is None else self.prompt.grad
        self.group.all_reduce([gradient, sums])
        self.prompt.grad = gradient / sums[1]
        self.optimizer.step()
        return float(sums[0] / sums[1])
