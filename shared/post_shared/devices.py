"""Where a model runs."""

from __future__ import annotations

import torch

from post_shared.errors import InvalidInput


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
