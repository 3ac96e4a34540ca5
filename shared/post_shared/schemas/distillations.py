"""The documents of ``/v1/distillations``, and the settings of distillation. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from post_shared.schemas.common import Name, Options, Reference, Seed

Template = Annotated[
    str, Field(max_length=200, pattern=r"^[^{}]*\{text\}[^{}]*$", description="For example '{text} It was'.")
]
Layers = Annotated[int, Field(ge=1)] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class DistilOptions(Options):
    """How to distil (method §1). ``steps``, ``max_minutes`` or both limit the run."""

    keep_layers: Layers = Field(default=8, description="How many layers to keep, or the indices of the layers to keep.")
    layer_pattern: Literal["ends", "even", "front", "search"] = Field(
        "front", description="Which layers to keep when a number is given."
    )
    student_init: Literal["least_squares", "copy"] = Field(
        "least_squares", description="least_squares: fitted in closed form; copy: unchanged layers (paper)."
    )
    templates: tuple[Template, ...] = Field(
        (), max_length=20, description="Short paragraphs are put into one of these."
    )
    freeze_head: bool = True
    freeze_embeddings: bool = True
    steps: int | None = Field(default=None, ge=1, le=100_000_000)
    max_minutes: float | None = Field(default=None, gt=0)
    early_stopping: bool = Field(default=False, description="Stop when the smoothed loss no longer falls.")
    learning_rate: float = Field(default=1e-3, gt=0, description="The paper: 2.5e-4, for 500,000 steps.")
    temperature: float = Field(default=2.0, gt=0, description="Temperature of the distributions in L_ce (Eq. 1).")
    alignment: float = Field(
        default=0.0, ge=0, description="Weight of the inner hidden states' loss; not in the paper."
    )
    batch_tokens: int = Field(default=512, ge=1, le=2**24)
    gradient_accumulation_steps: int | None = Field(
        default=None,
        ge=1,
        le=2**16,
        description="Micro-batches per batch, run one by one; by default, as few as fit in memory.",
    )
    sequence_length: int = Field(default=64, ge=1, le=2**16)
    init_tokens: int = Field(
        default=15_000, ge=1, le=2**30, description="Tokens of text for the least-squares initialisation."
    )
    seed: Seed = 0

    @property
    def rows(self) -> int:
        """Sequences in a batch."""
        return self.batch_tokens // self.sequence_length

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.steps is None and self.max_minutes is None:
            raise ValueError("set how long to distil: steps, max_minutes or both")
        if self.sequence_length > self.batch_tokens:
            raise ValueError("batch_tokens must be at least sequence_length")
        steps = self.gradient_accumulation_steps
        if steps is not None and steps > self.rows:
            raise ValueError(f"gradient_accumulation_steps is at most {self.rows}, the number of sequences in a batch")
        if not isinstance(self.keep_layers, int) and self.layer_pattern != "front":
            raise ValueError("layer_pattern needs a number of layers, but keep_layers lists them already")
        return self


class DistillationCreate(DistilOptions):
    """Distil a target model into a student (method §1)."""

    target: Reference = Field(description="Id or name of the target model.")
    name: Name = Field(description="Name of the new student.")
    corpus: list[Reference] = Field(
        min_length=1, max_length=100, description="Ids or names of datasets; of rows, the texts are used."
    )
