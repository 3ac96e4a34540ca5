"""The task of a prompt. Never imports torch."""

from __future__ import annotations

from pydantic import Field

from post_shared.schemas.common import Document


class TaskSpec(Document):
    """What a prompt is for: a template with label words, or free answers. See :class:`post_shared.data.tasks.Task`."""

    template: str = Field(max_length=2_000, description="The text with a {text} slot, and {mask} for masked models.")
    label_words: dict[str, list[str]] | None = Field(
        default=None, description="Label -> label words. Absent for generation tasks."
    )
