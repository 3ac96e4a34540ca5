"""What this machine can do: its matrix rate, and how much memory some work takes."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import psutil
import torch

SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices that are multiplied: far above the caches, and the shape that suits the kernels."""
PROBE = 0.25
"""Seconds of one measurement."""
LOOK = 0.005
"""Seconds between two looks at the memory."""


def matrix_rate(
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP per second of the machine's own matrix product in ``dtype``, measured for :data:`PROBE` seconds."""
    place = device or torch.device("cpu")
    side = SIDE.get(place.type, SIDE["cpu"])
    a, b = (torch.randn(side, side, device=place, dtype=dtype) for _ in range(2))
    a @ b
    finish(place)
    done, began = 0, clock()
    while clock() - began < (PROBE if seconds is None else seconds):
        a @ b
        finish(place)
        done += 1
    return done * 2 * side**3 / (clock() - began)


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Peak:
    """The most memory above that at its start which this process (or the GPU) held while it was open, in ``bytes``."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._process = psutil.Process()
        self._over = threading.Event()
        self.bytes = 0

    def __enter__(self) -> Peak:
        self._before = self._now()
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            return self
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda is not None:
            self.bytes = torch.cuda.max_memory_allocated(self._cuda) - self._before
            return
        self._over.set()
        self._watcher.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(LOOK):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, self._now() - self._before)

    def _now(self) -> int:
        if self._cuda is not None:
            return torch.cuda.memory_allocated(self._cuda)
        return int(self._process.memory_info().rss)


def about(device: torch.device) -> dict[str, Any]:
    """The machine, for beside the figures."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": str(device),
        "processor": name,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The processor's name, with the widest vectors it has: they set the matrix rate."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
