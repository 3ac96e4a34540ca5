"""The settings of tuning. Never imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from post_shared.schemas.common import Options, Seed


class TuneOptions(Options):
    """How to tune a prompt (method §2). ``learning_rate`` falls linearly to 0."""

    num_virtual_tokens: int = Field(default=20, ge=1, le=1000, description="Vectors in the prompt; the paper has 100.")
    steps: int = Field(default=200, ge=1, le=100_000)
    batch_size: int = Field(default=32, ge=1, le=2**20, description="Rows in a step; with DP, on average.")
    learning_rate: float = Field(default=0.02, gt=0, description="On a small student it matters more than all else.")
    max_length: int = Field(default=128, ge=1, le=2**24, description="Tokens of a text; the rest is cut.")
    seed: Seed = 0
    prompt_init: Literal["instruction", "random"] = Field(
        default="instruction",
        description="The embeddings of a text that states the task, or random rows of the vocabulary.",
    )
    average_iterates: bool = Field(
        default=False, description="Keep the average of the second half's iterates, not the last one."
    )


PLAIN = TuneOptions()
"""Defaults without differential privacy."""
PRIVATE = TuneOptions(steps=80, batch_size=64, learning_rate=0.015)
"""Defaults with differential privacy. The noise of a step is shared by its batch, so fewer, larger batches carry less
of it for about the same number of rows seen."""
