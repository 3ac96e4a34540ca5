"""The task of a prompt. Never imports torch."""

from __future__ import annotations

from pydantic import Field

from post_shared.schemas.common import Document


class TaskSpec(Document):
    """The task of a prompt: a template with label words (classification) or without (generation)."""

    template: str = Field(
        max_length=2_000, description="Text with a {text} slot and, for masked models, a {mask} slot."
    )
    label_words: dict[str, list[str]] | None = Field(
        default=None, description="Label -> label words. Absent for generation tasks."
    )
