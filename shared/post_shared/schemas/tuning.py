"""The settings of tuning. Never imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from post_shared.schemas.common import Options, Seed


class TuneOptions(Options):
    """How to tune a prompt (method §2). ``learning_rate`` falls linearly to 0."""

    num_virtual_tokens: int = Field(default=20, ge=1, le=1000, description="Vectors in the prompt; the paper uses 100.")
    steps: int = Field(default=200, ge=1, le=100_000)
    batch_size: int = Field(default=32, ge=1, le=2**20, description="Rows per step; with DP, on average.")
    learning_rate: float = Field(default=0.02, gt=0, description="The most important setting for a small student.")
    max_length: int = Field(
        default=128, ge=1, le=2**24, description="Maximum tokens per text; longer texts are truncated."
    )
    seed: Seed = 0
    prompt_init: Literal["instruction", "random"] = Field(
        default="instruction",
        description="Start from the embeddings of an instruction that states the task, or of random tokens.",
    )
    average_iterates: bool = Field(
        default=False, description="Use the average of the iterates of the second half of the run, not the last one."
    )


PLAIN = TuneOptions()
"""Defaults without differential privacy."""
PRIVATE = TuneOptions(steps=80, batch_size=64, learning_rate=0.015)
"""Defaults with differential privacy. A step adds its noise once per batch, so fewer, larger batches add less noise for
about the same number of rows."""
