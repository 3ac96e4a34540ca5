"""The documents of ``/v1/transfers``, and the settings of a transfer. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from post_shared.schemas.common import Options, Reference, Seed


class TransferOptions(Options):
    """How to transfer a prompt (method §3)."""

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        default=0.7,
        description="Weight in Eq. 5 (paper), or of the target's own scores (ensemble). 'auto': Eq. 6, which needs "
        "public rows with the task's labels.",
    )
    method: Literal["ensemble", "paper"] = Field("ensemble", description="paper: Eq. 3; ensemble: match class scores.")
    prompt_init: Literal["instruction", "source"] | None = Field(
        None,
        description="Start from an instruction, which states the task, or the source prompt. Default: by the method.",
    )
    steps: int = Field(default=250, ge=1, le=100_000)
    batch_size: int = Field(default=16, ge=1, le=1024)
    learning_rate: float | None = Field(
        None, gt=0, description="Default: 0.003 from an instruction, 0.03 from the source prompt."
    )
    temperature: float = Field(default=2.0, gt=0, description="For the paper's method only.")
    max_rows: int = Field(default=512, ge=1, le=2**24)
    max_length: int = Field(default=128, ge=1, le=2**16)
    seed: Seed = 0


class TransferCreate(TransferOptions):
    """Transfer a source prompt to the target model with public text (method §3)."""

    prompt: Reference = Field(description="Id of the source prompt.")
    target: Reference = Field(description="Id or name of the target model.")
    dataset: Reference = Field(
        description="Id or name of a public dataset. Its labels are not used, except by alpha 'auto'."
    )
