"""A memory plan: what a training step of a prompt, or an inference pass, will take, known before it runs.

Nearly all memory of a step holds activations for the backward pass; an inference pass holds those of one layer. Both
grow with the number of positions that run at a time. The memory of one position is measured on the model itself, so a
plan holds for any architecture.
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
from post_shared.engine.offload import observe_saved
from post_shared.errors import OutOfMemory
from post_shared.model.language_model import LanguageModel

SAMPLE_POSITIONS = 16
"""Positions of the measured pass."""
SHARE = 0.6
"""Share of the free memory that a step may take; the rest is for memory that isn't counted."""
GRAPH_STEPS = 2
"""Steps that hold memory at a time with CUDA graphs: captured passes keep theirs while another runs eagerly."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryPlan:
    """Positions (texts with their prompts) that run at a time, and their memory, in bytes."""

    positions: int
    per_position: int
    free: int
    prompt_copy: float = 0.0
    """Memory that a text of a packed row keeps per prompt vector (its keys and values), in positions."""

    @property
    def bytes(self) -> int:
        return self.positions * self.per_position

    def cut(self, length: int, *, packed: bool = False) -> Callable[[Batch], list[Batch]]:
        """A function that splits a batch into micro-batches that fit, behind a prompt of ``length`` vectors that runs
        once per row or, with ``packed``, once per micro-batch."""
        if packed:
            return lambda batch: filled(batch, self.positions - length, per_row=ceil(length * self.prompt_copy))
        return lambda batch: batch.split(len(batch), tokens=self.positions, reserved=length)


def filled(batch: Batch, tokens: int, *, per_row: int = 0) -> list[Batch]:
    """Split a batch into micro-batches of at most ``tokens`` tokens each, or of one row.

    Padding isn't counted, but ``per_row`` tokens are added to every row. Rows are sorted by length and cut into as few
    micro-batches as possible, the largest of which is as small as possible, because it decides the peak memory.
    """
    lengths = [batch.encoded.length(row) + per_row for row in batch.index]
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)

    def parts(limit: int) -> list[list[int]]:
        result: list[list[int]] = []
        remaining = -1
        for row in by_length:
            if lengths[row] > remaining:
                result.append([])
                remaining = limit
            result[-1].append(row)
            remaining -= lengths[row]
        return result

    fewest = len(parts(tokens))
    smallest_limit = bisect_left(range(tokens), -fewest, key=lambda limit: -len(parts(limit)))
    return [batch.part(rows) for rows in parts(smallest_limit)]


def plan_step(model: LanguageModel, *, longest: int, max_bytes: int | None = None) -> MemoryPlan:
    """The largest micro-batch that fits the free memory and, if given, ``max_bytes`` bytes.

    ``longest`` counts the positions of the longest text with its prompt: at least that many run, whatever
    ``max_bytes`` is.

    Raises:
        OutOfMemory: not even one text fits.
    """
    per_position, free = saved_per_position(model), min(map(free_bytes, model.devices))
    fits = int(free * SHARE) // per_position
    if fits < longest:
        raise OutOfMemory(
            f"a step on one text with its prompt ({longest} positions) takes about {longest * per_position / 1e6:.0f} "
            f"MB for the backward pass, and {free / 1e6:.0f} MB are free on {model.device}; use shorter texts "
            "(max_length), a shorter prompt, or a machine with more memory"
        )
    if model.device.type == "cuda" and model.packs:
        fits = max(longest, fits // GRAPH_STEPS)
    wanted = fits if max_bytes is None else max(longest, max_bytes // per_position)
    prompt_copy = model.prefix(torch.zeros(1, model.hidden_size)).nbytes / per_position if model.packs else 0.0
    return MemoryPlan(min(fits, wanted), per_position, free, prompt_copy)


def runs_prompt_once(model: LanguageModel, longest: int) -> bool:
    """Whether texts of up to ``longest`` positions, prompt included, share one run of their prompt, so that
    :meth:`MemoryPlan.cut` may count it once. A GPU may run it once per text."""
    return longest <= model.packs and model.device.type != "cuda"


def plan_pass(model: LanguageModel, *, longest: int, kept: int = 0) -> MemoryPlan:
    """The number of positions that an inference pass can run at a time in the free memory.

    ``longest`` counts the positions of the longest text with its prompt; ``kept`` are bytes stored per position.

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
    """Peak bytes per position of an inference pass: measured on a few positions, once per model."""
    if model in _held:
        return _held[model]

    def peak(positions: int) -> int:
        return peak_bytes(lambda: model.hidden(torch.zeros(1, positions, dtype=torch.long)))

    # The difference leaves out memory that doesn't grow with the positions.
    _held[model] = max(1, (peak(2 * SAMPLE_POSITIONS) - peak(SAMPLE_POSITIONS)) // SAMPLE_POSITIONS)
    return _held[model]


_saved: WeakKeyDictionary[LanguageModel, int] = WeakKeyDictionary()


def saved_per_position(model: LanguageModel) -> int:
    """Bytes per position that a pass keeps for the backward pass: measured on a few positions, once per model."""
    if model in _saved:
        return _saved[model]
    prompt = torch.zeros(SAMPLE_POSITIONS, model.hidden_size, device=model.device, requires_grad=True)
    token = torch.zeros(1, 1, dtype=torch.long)
    kept = kept_bytes(lambda: model.hidden(token, prompt=prompt), model.model.parameters())
    _saved[model] = max(1, kept // (SAMPLE_POSITIONS + 1))
    return _saved[model]


def kept_bytes(run: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes of the tensors that ``run`` keeps for the backward pass, not counting ``weights``, which exist anyway."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.enable_grad(), hooks, observe_saved(keep):
        output = run()
    del output  # until here no kept tensor was freed, so none was counted twice
    return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """Free memory of the GPU, or of this machine within the limit of its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no limit, or an unreadable one
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return max(free, 0)
