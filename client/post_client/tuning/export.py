"""Export a tuned prompt as a prompt file, which may leave the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from post_shared.files.prompt_file import PromptFile

if TYPE_CHECKING:
    from post_client.tuning.tune import TuneResult
    from post_shared.data.tasks import Task


def prompt_file(result: TuneResult, model_hash: str, task: Task) -> PromptFile:
    """The prompt file: embeddings, model hash, task and, if there is one, the privacy claim; nothing else."""
    epsilon, delta = (result.statement.claim if result.statement else None) or (None, None)
    return PromptFile(
        embeddings=result.prompt.embeddings.numpy(),
        model_hash=model_hash,
        task=task.spec(),
        epsilon=epsilon,
        delta=delta,
    )
