"""Devices and data types that models run on."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

from post_shared.errors import InvalidInput

SPREAD = "spread"
"""The device name for a model larger than any one device: see :mod:`post_shared.engine.offload`."""
_UNITS = {"": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}iB": 1024**_power}
Memory = dict[int | str, int]
"""Bytes that weights may take on each GPU, by number, and in memory (``"cpu"``); the rest goes to the disk."""


def choose_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        InvalidInput: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InvalidInput(f"{device!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(f"{device!r} was requested, but torch finds no CUDA device; use cpu or auto")
    return chosen


def usual_dtype(device: torch.device) -> torch.dtype:
    """The type that a model computes in by default: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def processor(device: torch.device) -> str:
    """The hardware that decides how sums are rounded: the GPU's name, or the CPU's with its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # the file doesn't exist on every system
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{platform.machine()}, {platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def parse_memory(text: str) -> Memory:
    """``0=20GiB,1=20GiB,cpu=60GB`` in bytes; empty for an empty text.

    Raises:
        InvalidInput: it has another form.
    """
    memory: Memory = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+|cpu)=(\d+(?:\.\d+)?)([a-zA-Z]*)", part)
        if not match or match[3] not in _UNITS:
            raise InvalidInput(
                f"{part!r} doesn't name a device and its memory; write 0=20GiB,cpu=60GiB (GPU number or cpu)"
            )
        name: int | str = match[1] if match[1] == "cpu" else int(match[1])
        memory[name] = int(float(match[2]) * _UNITS[match[3]])
    return memory
