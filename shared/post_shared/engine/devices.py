"""Where a model runs."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

from post_shared.errors import InvalidInput

SPREAD = "spread"
"""The device of a model that is larger than any: see :mod:`post_shared.engine.offload`."""
WIDE = 256
"""Hidden size from which matrices, not all that is around them, take most of the time."""
_UNITS = {"": 1}
for _at, _letter in enumerate("KMGT", 1):
    _UNITS |= {f"{_letter}B": 1000**_at, f"{_letter}iB": 1024**_at}
Memory = dict[int | str, int]
"""Bytes that weights may take on each GPU, by number, and in memory (``"cpu"``); what is over goes to the disk."""


def choose_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        InvalidInput: no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InvalidInput(f"{device!r} is no device; use auto, cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(f"{device!r} was asked for, but torch sees no CUDA device; use cpu or auto")
    return place


def usual_dtype(place: torch.device) -> torch.dtype:
    """What a model computes in: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if place.type == "cpu" else torch.bfloat16


def training_dtype(place: torch.device, width: int) -> torch.dtype:
    """What a frozen model of that hidden size computes in, where others learn from it: bfloat16 also on a CPU with
    matrix units for it (AMX), which multiplies several times as fast in it. Narrow models gain nothing there."""
    units = place.type == "cpu" and width >= WIDE and torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.bfloat16 if units else usual_dtype(place)


def processor(place: torch.device) -> str:
    """What computes there, as far as sums are rounded by it: the GPU's name, or the CPU's and what it can do."""
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    with suppress(OSError):  # not on every system
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{platform.machine()}, {platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def parse_memory(text: str) -> Memory:
    """``0=20GiB,1=20GiB,cpu=60GB`` in bytes; nothing for an empty text.

    Raises:
        InvalidInput: it has another form.
    """
    found: Memory = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        match = re.fullmatch(r"(\d+|cpu)=(\d+(?:\.\d+)?)([a-zA-Z]*)", part)
        if not match or match[3] not in _UNITS:
            raise InvalidInput(f"{part!r} is no device with its memory; write 0=20GiB,cpu=60GiB (GPU number or cpu)")
        place: int | str = match[1] if match[1] == "cpu" else int(match[1])
        found[place] = int(float(match[2]) * _UNITS[match[3]])
    return found
