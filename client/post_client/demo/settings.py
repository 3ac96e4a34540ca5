"""Every number of the demo, in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from post_shared.errors import InvalidInput


@dataclass(frozen=True)
class DemoSettings:
    """The real run. :data:`FAST` has the numbers of the smoke run."""

    fast: bool = False
    upper_bound: bool = False
    seed: int = 0
    task: str = "sst2"
    """Preset of the private task, film reviews."""
    device: str = "auto"

    # data
    train_rows: int = 8000
    """Private rows to tune on."""
    test_rows: int = 400
    """Private rows that measure; only the owner has their labels."""
    public_rows: int = 2000
    news_paragraphs: int = 300
    """News prose in the distillation corpus, next to the review, editorial and tweet snippets."""

    # distil
    keep_layers: int = 8
    distil_minutes: float = 6.0
    distil_steps: int | None = None
    distil_learning_rate: float = 1e-3
    distil_batch_tokens: int = 512
    sequence_length: int = 64
    answer_forms: tuple[str, ...] = ("{text} It was",)
    """The provider knows the family of tasks that its customers have, not their tasks."""

    # tune
    prompt_length: int = 20
    max_length: int = 64
    tune_steps: int = 100
    tune_batch_size: int = 32
    tune_learning_rate: float = 0.02

    # tune with differential privacy
    epsilon: float = 8.0
    dp_steps: int = 60
    dp_batch_size: int = 64
    dp_learning_rate: float = 0.015
    dp_clip_norm: float = 0.1

    # transfer
    transfer_steps: int = 100
    transfer_batch_size: int = 16
    transfer_rows: int = 512
    alpha: float = 0.7

    # the forbidden upper bound: a prompt tuned on the target model itself
    upper_steps: int = 150
    upper_batch_size: int = 16
    upper_learning_rate: float = 0.01

    # predictions
    texts_per_request: int = 32

    def distillation(self) -> dict[str, Any]:
        """Options of ``client.distillations.create``."""
        return {
            "keep_layers": self.keep_layers,
            "minutes": self.distil_minutes,
            "steps": self.distil_steps,
            "learning_rate": self.distil_learning_rate,
            "batch_tokens": self.distil_batch_tokens,
            "sequence_length": self.sequence_length,
            "answer_forms": list(self.answer_forms),
            "seed": self.seed,
        }

    def transfer(self) -> dict[str, Any]:
        """Options of ``client.transfers.create``."""
        return {
            "alpha": self.alpha,
            "steps": self.transfer_steps,
            "batch_size": self.transfer_batch_size,
            "max_rows": self.transfer_rows,
            "max_length": self.max_length,
            "seed": self.seed,
        }


REAL = DemoSettings()
FAST = DemoSettings(
    fast=True,
    train_rows=240,
    test_rows=64,
    public_rows=96,
    news_paragraphs=0,
    keep_layers=2,
    distil_minutes=0.1,
    distil_steps=20,
    distil_batch_tokens=256,
    sequence_length=32,
    prompt_length=4,
    max_length=32,
    tune_steps=20,
    dp_steps=20,
    dp_batch_size=16,
    transfer_steps=10,
    transfer_rows=64,
    upper_steps=20,
)


def demo_settings(*, fast: bool, seed: int, minutes: float | None, upper_bound: bool) -> DemoSettings:
    """The numbers of a run, with what the command line changes.

    Raises:
        InvalidInput: ``minutes`` isn't above 0.
    """
    chosen = replace(FAST if fast else REAL, seed=seed, upper_bound=upper_bound)
    if minutes is None:
        return chosen
    if minutes <= 0:
        raise InvalidInput(f"--minutes is above 0, not {minutes}")
    return replace(chosen, distil_minutes=minutes, distil_steps=None)
