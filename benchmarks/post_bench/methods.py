"""The methods that ``post bench quality`` compares, and their settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from post_bench.results import METHODS, Key
from post_shared.errors import InvalidInput
from post_shared.schemas.distillations import DistilOptions
from post_shared.schemas.transfers import TransferOptions
from post_shared.schemas.tuning import PLAIN, PRIVATE, TuneOptions

UPPER = TuneOptions(steps=300, batch_size=16, learning_rate=0.01)
"""Tuning on the large model itself: it learns at a lower rate than a student does."""


@dataclass(frozen=True)
class QualityConfig:
    """What is run. The parts are the defaults of the service and the owner's commands."""

    distil: DistilOptions = field(default_factory=lambda: DistilOptions(max_minutes=20.0))
    plain: TuneOptions = PLAIN
    private: TuneOptions = PRIVATE
    upper: TuneOptions = UPPER
    transfer: TransferOptions = field(default_factory=TransferOptions)
    epsilon: float = 8.0
    test_rows: int | None = None
    max_length: int = 128

    def __post_init__(self) -> None:
        if self.test_rows is not None and self.test_rows < 1:
            raise InvalidInput("--test-rows is at least 1")


def wanted(pairs: list[tuple[str, str]], methods: list[str], seeds: int) -> list[Key]:
    """Every figure, in an order in which early ones already compare: all methods of a pair and seed, then the next.

    Raises:
        InvalidInput: an unknown method, or no seed.
    """
    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise InvalidInput(f"there is no method {unknown[0]!r}; there are: {', '.join(METHODS)}")
    if seeds < 1:
        raise InvalidInput("--seeds is at least 1")
    names = [name for name in METHODS if name in methods]
    return [(*pair, method, seed) for seed in range(seeds) for pair in pairs for method in names]
