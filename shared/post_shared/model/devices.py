"""Devices and data types: the part of :mod:`post_shared.engine.devices` for the rest of POST."""

from __future__ import annotations

from post_shared.engine.devices import (
    SPREAD,
    Memory,
    choose_device,
    parse_memory,
    processor,
    usual_dtype,
)

__all__ = [
    "SPREAD",
    "Memory",
    "choose_device",
    "parse_memory",
    "processor",
    "usual_dtype",
]
