"""Every number of the demo, in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace

from post_shared.errors import InvalidInput
from post_shared.schemas.distillations import DistilOptions
from post_shared.schemas.transfers import TransferOptions
from post_shared.schemas.tuning import PRIVATE, TuneOptions

MAX_LENGTH = 64
"""Tokens per text; the demo's texts are sentences."""


@dataclass(frozen=True)
class DemoSettings:
    """The settings of the real run; :data:`FAST` has those of the smoke test."""

    fast: bool = False
    upper_bound: bool = False
    seed: int = 0
    task: str = "sst2"
    """Preset of the private task: film reviews."""
    device: str = "auto"

    train_rows: int = 8000
    """Private rows to tune on."""
    test_rows: int = 400
    """Private rows for testing; only the owner has their labels."""
    public_rows: int = 2000
    news_paragraphs: int = 300
    """News paragraphs in the distillation corpus, besides the review, editorial and tweet snippets."""

    distillation: DistilOptions = DistilOptions(max_minutes=6.0, templates=("{text} It was",))
    """The provider knows what kind of tasks its customers have (the template), not the tasks themselves."""
    tuning: TuneOptions = TuneOptions(steps=100, max_length=MAX_LENGTH)
    private_tuning: TuneOptions = PRIVATE.replace(steps=60, max_length=MAX_LENGTH)
    epsilon: float = 8.0
    transfer: TransferOptions = TransferOptions(steps=100, max_length=MAX_LENGTH)
    upper: TuneOptions = TuneOptions(steps=150, batch_size=16, learning_rate=0.01, max_length=MAX_LENGTH)
    """The forbidden upper bound: a prompt tuned on the target model itself."""

    texts_per_request: int = 32
    """Texts per prediction request."""

    def seeded(self, seed: int) -> DemoSettings:
        """The same settings with another seed everywhere."""
        names = ("distillation", "tuning", "private_tuning", "transfer", "upper")
        return replace(self, seed=seed, **{name: getattr(self, name).replace(seed=seed) for name in names})


REAL = DemoSettings()
FAST = DemoSettings(
    fast=True,
    train_rows=240,
    test_rows=64,
    public_rows=96,
    news_paragraphs=0,
    distillation=REAL.distillation.replace(
        keep_layers=2, max_minutes=0.1, steps=20, batch_tokens=256, sequence_length=32
    ),
    tuning=REAL.tuning.replace(num_virtual_tokens=4, steps=20, max_length=32),
    private_tuning=REAL.private_tuning.replace(num_virtual_tokens=4, steps=20, batch_size=16, max_length=32),
    transfer=REAL.transfer.replace(steps=10, max_rows=64, max_length=32),
    upper=REAL.upper.replace(num_virtual_tokens=4, steps=20, max_length=32),
)


def demo_settings(*, fast: bool, seed: int, minutes: float | None, upper_bound: bool) -> DemoSettings:
    """The settings of a run with the command line's changes.

    Raises:
        InvalidInput: ``minutes`` isn't above 0.
    """
    settings = replace((FAST if fast else REAL).seeded(seed), upper_bound=upper_bound)
    if minutes is None:
        return settings
    if minutes <= 0:
        raise InvalidInput(f"--max-minutes must be above 0, not {minutes}")
    return replace(settings, distillation=settings.distillation.replace(max_minutes=minutes, steps=None))
