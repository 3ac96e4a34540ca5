"""Where models run, and in which type: what the rest of POST needs of the engine's devices."""

from __future__ import annotations

from post_shared.engine.devices import (
    SPREAD,
    WIDE,
    Memory,
    choose_device,
    parse_memory,
    processor,
    training_dtype,
    usual_dtype,
)

__all__ = [
    "SPREAD",
    "WIDE",
    "Memory",
    "choose_device",
    "parse_memory",
    "processor",
    "training_dtype",
    "usual_dtype",
]
