"""Measurements of this machine: its matrix rate, and the peak memory of a block of code."""

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
"""Size of the square matrices: much larger than the caches, and a shape that suits the kernels."""
PROBE = 0.25
"""Seconds per measurement."""
POLL_SECONDS = 0.005
"""Seconds between two measurements of the memory."""


def matrix_rate(
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP per second of the machine's matrix product in ``dtype``, measured for :data:`PROBE` seconds."""
    device = device or torch.device("cpu")
    side = SIDE.get(device.type, SIDE["cpu"])
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    finish(device)
    products, began = 0, clock()
    while clock() - began < (PROBE if seconds is None else seconds):
        a @ b
        finish(device)
        products += 1
    return products * 2 * side**3 / (clock() - began)


def finish(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Peak:
    """Context manager: peak memory of this process (or the GPU) above that at its start, in ``bytes``."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._process = psutil.Process()
        self._stop = threading.Event()
        self.bytes = 0

    def __enter__(self) -> Peak:
        self._before = self._now()
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            return self
        self._poller = threading.Thread(target=self._poll, daemon=True)
        self._poller.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda is not None:
            self.bytes = torch.cuda.max_memory_allocated(self._cuda) - self._before
            return
        self._stop.set()
        self._poller.join()
        self._measure()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._measure()

    def _measure(self) -> None:
        self.bytes = max(self.bytes, self._now() - self._before)

    def _now(self) -> int:
        if self._cuda is not None:
            return torch.cuda.memory_allocated(self._cuda)
        return int(self._process.memory_info().rss)


def about(device: torch.device) -> dict[str, Any]:
    """A description of the machine, stored with the figures."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": str(device),
        "processor": name,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The processor's architecture and its widest vectors, which determine the matrix rate."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
