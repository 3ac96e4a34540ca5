"""Whether a model computes faster in float32 or in bfloat16 on this CPU: measured on the shapes that it will run.

Names of instruction sets don't tell: AMX and AVX-512 BF16 make tall products 2 to 6 times as fast in bfloat16, other
CPUs make them slower, and products of a few rows may go either way on the same CPU. So the products of one layer are
timed in both types, for each use by itself, and the result is kept for this CPU, number of threads and version of
torch.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from platformdirs import user_cache_path
from torch import Tensor, nn

from post_shared.engine.devices import processor
from post_shared.errors import InvalidInput
from post_shared.files.atomic import replacing

Use = Literal["training", "serving", "decoding"]
"""What a model is for: passes that are differentiated to a prompt, passes that score texts, one-token steps."""
ROWS: dict[Use, int] = {"training": 320, "serving": 320, "decoding": 32}
"""Rows of a product in each use: texts with their prompts, or one token of each text."""
NARROW = 256
"""Hidden size below which products aren't what takes the time."""
GAIN = 0.8
"""bfloat16 is chosen if it takes at most this share of float32's time: what isn't a product gains nothing."""
PRODUCTS = 3e8
"""Multiplications in one product at most: of wide layers a part is measured, so that it stays below 0.3 s."""
ROUNDS, SECONDS = 7, 0.1
"""Rounds of one measurement, and the time after which no more begin."""
VARIABLE = "POST_PRECISION"
CHOICES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Precision:
    """The data type of a model, and why it is that."""

    dtype: torch.dtype
    reason: str

    def document(self) -> dict[str, str]:
        """For the result of a job."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "reason": self.reason}


def choose_precision(device: torch.device, width: int, inner: int | None = None, use: Use = "training") -> Precision:
    """The type for a model of that hidden size and inner size of its feed-forward blocks.

    ``POST_PRECISION`` (``float32`` or ``bfloat16``) overrides the measurement.

    Raises:
        InvalidInput: the variable has another value.
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in CHOICES:
        raise InvalidInput(f"{VARIABLE} is {asked!r}; it is one of: {', '.join(CHOICES)}")
    if asked != "auto":
        return Precision(getattr(torch, asked), f"{VARIABLE}={asked}")
    if device.type != "cpu":
        return Precision(torch.bfloat16, "a GPU")
    if width < NARROW:
        return Precision(torch.float32, f"hidden size {width}: too narrow to gain from bfloat16")
    share = time_share(width, inner or 4 * width, use)
    if share <= GAIN:
        return Precision(torch.bfloat16, f"measured: {1 / share:.1f} times as fast as float32 ({use})")
    return Precision(torch.float32, f"measured: bfloat16 takes {share:.2f} of float32's time ({use})")


def inner_size(config: Any) -> int | None:
    """Inner size of the feed-forward blocks, under any of the names that configurations give it."""
    for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        if size := getattr(config, name, None):
            return int(size)
    return None


def time_share(width: int, inner: int, use: Use) -> float:
    """The time of one layer's products in bfloat16, as a share of float32's; measured once and kept."""
    return _time_share(width, inner, use, torch.get_num_threads(), cache_file())


@lru_cache(maxsize=256)
def _time_share(width: int, inner: int, use: Use, threads: int, file: Path) -> float:
    name = f"{processor(torch.device('cpu'))} | {threads} threads | torch {torch.__version__} | {width} x {inner} {use}"
    kept = _read(file)
    if name not in kept:
        kept[name] = measure(width, inner, use)
        _write(file, kept)
    return kept[name]


def measure(width: int, inner: int, use: Use) -> float:
    """Time both types in turn, so that what else the machine does weighs on both alike; the median of their ratios."""
    inner = min(inner, max(64, int(PRODUCTS / (ROWS[use] * width))))
    steps = {dtype: _layer(width, inner, use, dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratios: list[float] = []
    began = time.perf_counter()
    for step in steps.values():  # kernels are built
        step()
    while len(ratios) < ROUNDS and (len(ratios) < 2 or time.perf_counter() - began < SECONDS):
        took = {dtype: _seconds(step) for dtype, step in steps.items()}
        ratios.append(took[torch.bfloat16] / took[torch.float32])
    return statistics.median(ratios)


def _layer(width: int, inner: int, use: Use, dtype: torch.dtype) -> Callable[[], object]:
    """The two products of a feed-forward block, which are most of a layer; in training, backward to the input too."""
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(*shape, generator=generator).mul_(0.02).to(dtype) for shape in ((inner, width), (width, inner))
    )
    rows = torch.randn(ROWS[use], width, generator=generator).to(dtype)

    def forward() -> Tensor:
        with torch.no_grad():
            return nn.functional.linear(nn.functional.linear(rows, first), second)

    def both_ways() -> None:
        with torch.no_grad():
            forward() @ second @ first  # (B, d) -> (B, inner) -> (B, d): the products of the backward pass

    return both_ways if use == "training" else forward


def _seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


# --- what was measured before -------------------------------------------------------------------------


def cache_file() -> Path:
    """Where measurements are kept; POST_CACHE names another folder."""
    return Path(os.environ.get("POST_CACHE") or user_cache_path("post")) / "precision.json"


def _read(file: Path) -> dict[str, float]:
    with suppress(OSError, ValueError):
        kept = json.loads(file.read_text("utf-8"))
        if isinstance(kept, dict):
            return {str(name): float(value) for name, value in kept.items()}
    return {}


def _write(file: Path, kept: dict[str, float]) -> None:
    """Atomically; a folder that can't be written costs a measurement next time, no more."""
    with suppress(OSError), replacing(file) as partial:
        partial.write_text(json.dumps(kept, indent=1), "utf-8")
