"""A memory plan: what a step that trains a prompt will take, or a pass that answers, said before it is made.

Nearly all of a step's memory are activations that the pass backward needs, those of a pass that answers one layer's.
Both grow with the positions that run at a time. What one position takes is measured on the model itself, so a plan
holds for any architecture.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor

from post_shared.data.batches import Batch
from post_shared.engine.memory_profiler import peak_bytes
from post_shared.engine.offload import watched
from post_shared.errors import OutOfMemory
from post_shared.model.language_model import LanguageModel

TASTE = 16
"""Positions of the pass that is measured."""
SHARE = 0.6
"""Of the free memory that a step may take; the rest is for what isn't counted."""
TWICE = 2
"""Steps that hold memory at a time where passes are replayed: what is recorded keeps it, beside one that isn't."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryPlan:
    """How many positions (texts with their prompts) run at a time, and what they take, in bytes."""

    positions: int
    per_position: int
    free: int
    copied: float = 0.0
    """What each text of a packed row keeps of its prompt (keys and values), in positions for each of its vectors."""

    @property
    def bytes(self) -> int:
        return self.positions * self.per_position

    def cut(self, length: int, *, packed: bool = False) -> Callable[[Batch], list[Batch]]:
        """How to cut a batch so that each part fits, behind a prompt of ``length`` vectors that runs for each row or,
        with ``packed``, once for all rows of a part."""
        if packed:
            return lambda batch: filled(batch, self.positions - length, each=ceil(length * self.copied))
        return lambda batch: batch.split(len(batch), tokens=self.positions, reserved=length)


def filled(batch: Batch, tokens: int, *, each: int = 0) -> list[Batch]:
    """Micro-batches of at most ``tokens``, padding not counted but ``each`` for every row, or of one row; together the
    same rows. In the order of their lengths they are cut into as few as can be, of which the largest is as small as can
    be: it sets the peak."""
    lengths = [batch.encoded.length(row) + each for row in batch.index]
    places = sorted(range(len(lengths)), key=lengths.__getitem__)

    def parts(most: int) -> list[list[int]]:
        found: list[list[int]] = []
        reserved = -1
        for at in places:
            if lengths[at] > reserved:
                found.append([])
                reserved = most
            found[-1].append(at)
            reserved -= lengths[at]
        return found

    fewest = len(parts(tokens))
    least = bisect_left(range(tokens), -fewest, key=lambda most: -len(parts(most)))
    return [batch.part(some) for some in parts(least)]


def plan_step(model: LanguageModel, *, longest: int, most: int | None = None) -> MemoryPlan:
    """The largest micro-batch that fits the free memory and, where that is given, ``most`` bytes.

    ``longest`` is what a single text takes with its prompt: that much is run whatever ``most`` says.

    Raises:
        OutOfMemory: not even one text fits.
    """
    per_position, free = saved_per_position(model), min(map(free_bytes, model.devices))
    fits = int(free * SHARE) // per_position
    if fits < longest:
        raise OutOfMemory(
            f"a step on one text with its prompt ({longest} positions) takes about {longest * per_position / 1e6:.0f} "
            f"MB for the pass backward, and {free / 1e6:.0f} MB are free on {model.device}; use shorter texts "
            "(max_length), a shorter prompt, or a machine with more memory"
        )
    if model.device.type == "cuda" and model.packs:
        fits = max(longest, fits // TWICE)
    wanted = fits if most is None else max(longest, most // per_position)
    copied = model.prefix(torch.zeros(1, model.hidden_size)).nbytes / per_position if model.packs else 0.0
    return MemoryPlan(min(fits, wanted), per_position, free, copied)


def runs_prompt_once(model: LanguageModel, longest: int) -> bool:
    """Whether texts of up to ``longest`` positions, prompt included, share one run of their prompt in a step, so that
    :meth:`MemoryPlan.cut` may count it once. A GPU may run it for each."""
    return longest <= model.packs and model.device.type != "cuda"


def plan_pass(model: LanguageModel, *, longest: int, kept: int = 0) -> MemoryPlan:
    """The most positions that a pass without gradients can run at a time in the free memory.

    ``longest`` is what a single text takes with its prompt; ``kept`` what is kept of each position, in bytes.

    Raises:
        OutOfMemory: not even one text fits.
    """
    per_position, free = held_per_position(model) + kept, min(map(free_bytes, model.devices))
    fits = int(free * SHARE) // per_position
    if fits < longest:
        raise OutOfMemory(
            f"answering a text with its prompt ({longest} positions) takes {longest * per_position / 1e6:.0f} MB, "
            f"and {free / 1e6:.0f} MB are free on {model.device}; use a shorter text or a machine with more memory"
        )
    return MemoryPlan(fits, per_position, free)


_held: WeakKeyDictionary[LanguageModel, int] = WeakKeyDictionary()


@torch.no_grad()
def held_per_position(model: LanguageModel) -> int:
    """Bytes that a pass without gradients holds at its peak, for each position: measured on a few, once for a model."""
    if model in _held:
        return _held[model]

    def peak(positions: int) -> int:
        return peak_bytes(lambda: model.hidden(torch.zeros(1, positions, dtype=torch.long)))

    _held[model] = max(1, (peak(2 * TASTE) - peak(TASTE)) // TASTE)  # without what is there however many run
    return _held[model]


_saved: WeakKeyDictionary[LanguageModel, int] = WeakKeyDictionary()


def saved_per_position(model: LanguageModel) -> int:
    """Bytes that a pass keeps for the way back, for each position: measured on a few of them, once for a model."""
    if model in _saved:
        return _saved[model]
    prompt = torch.zeros(TASTE, model.hidden_size, device=model.device, requires_grad=True)
    token = torch.zeros(1, 1, dtype=torch.long)
    kept = kept_bytes(lambda: model.hidden(token, prompt=prompt), model.model.parameters())
    _saved[model] = max(1, kept // (TASTE + 1))
    return _saved[model]


def kept_bytes(work: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes of the tensors that ``work`` keeps for the way back; ``weights``, which are there anyway, not counted."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.enable_grad(), hooks, watched(keep):
        made = work()
    del made  # until here nothing that was kept was freed, so nothing was counted twice
    return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """Memory that is free there: the GPU's, or this machine's within the limit of its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no limit, or none that can be read
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return max(free, 0)
