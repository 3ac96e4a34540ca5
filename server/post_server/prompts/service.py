"""Stored soft prompts: a row, and the prompt file as a blob."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from post_server.db.database import guard
from post_server.db.tables import ApiKeyRow, JobRow, ModelRow, PromptRow
from post_server.jobs.states import ENDED
from post_server.models.service import find_model_by_hash
from post_server.storage.blob_references import delete_unreferenced
from post_server.storage.blob_store import BlobStore
from post_shared.data.tasks import Task
from post_shared.errors import Conflict, InvalidInput, NotFound, PromptMismatch
from post_shared.files.prompt_file import PromptFile, read_prompt
from post_shared.schemas.common import Role
from post_shared.schemas.prompts import Prompt, PromptRole
from post_shared.schemas.tasks import TaskSpec


def add_prompt(
    session: Session,
    store: BlobStore,
    data: bytes,
    *,
    role: PromptRole,
    owner_key_id: str,
    source_id: str | None = None,
    max_bytes: int = 64 * 2**20,
) -> tuple[PromptRow, bool]:
    """Check a prompt file, store it and add its row. Nothing of an invalid file is stored.

    Returns:
        The row, and whether it is new: a source prompt pushed again by the same key returns the existing row.

    Raises:
        PromptFileInvalid: the bytes are not a valid prompt file.
        PromptMismatch: its model is unknown here or has another width.
    """
    prompt = read_prompt(data, max_bytes=max_bytes)
    guard(session)
    model = _model_of(session, prompt)
    sha256 = store.put(data)
    if role is PromptRole.SOURCE:
        duplicate = select(PromptRow).where(
            PromptRow.owner_key_id == owner_key_id, PromptRow.sha256 == sha256, PromptRow.role == role
        )
        if (existing := session.scalar(duplicate)) is not None:
            return existing, False
    row = PromptRow(
        role=role,
        owner_key_id=owner_key_id,
        model_id=model.id,
        model_hash=model.hash,
        length=prompt.length,
        width=prompt.width,
        task=prompt.task.model_dump(mode="json"),
        epsilon=prompt.epsilon,
        delta=prompt.delta,
        sha256=sha256,
        size_bytes=len(data),
        source_id=source_id,
    )
    session.add(row)
    session.flush()
    return row, True


def visible_prompt(session: Session, caller: ApiKeyRow, prompt_id: str) -> PromptRow:
    """The prompt, if the caller may see it: its owner or the provider.

    Raises:
        NotFound: it doesn't exist or belongs to someone else (the response doesn't tell which).
    """
    row = session.get(PromptRow, prompt_id)
    if row is None or (caller.role is not Role.PROVIDER and row.owner_key_id != caller.id):
        raise NotFound(f"There is no prompt {prompt_id!r}.", prompt=prompt_id)
    return row


def delete_prompt(session: Session, store: BlobStore, row: PromptRow) -> None:
    """Delete the prompt, and its bytes unless another prompt has the same.

    Raises:
        Conflict: an unfinished job needs it.
    """
    guard(session)
    for job in session.scalars(select(JobRow).where(JobRow.state.not_in(ENDED))):
        if job.request.get("prompt") == row.id:
            raise Conflict(f"The job {job.id} needs this prompt; cancel the job or wait for it to end.", job=job.id)
    session.delete(row)
    session.flush()
    delete_unreferenced(session, store, [row.sha256])


def prompt_document(row: PromptRow) -> Prompt:
    """The row as the API shows it."""
    return Prompt.model_validate({name: getattr(row, name) for name in Prompt.model_fields})


def _model_of(session: Session, prompt: PromptFile) -> ModelRow:
    model = find_model_by_hash(session, prompt.model_hash)
    if model is None:
        raise PromptMismatch(
            f"No model here has the hash {prompt.model_hash}; pull the student again and tune a prompt on it.",
            model_hash=prompt.model_hash,
        )
    if prompt.width != model.hidden_size:
        raise PromptMismatch(
            f"The prompt has width {prompt.width}, but the model {model.name} has width {model.hidden_size}.",
            width=prompt.width,
            hidden_size=model.hidden_size,
        )
    return model


def check_prompt_fits(prompt: PromptRow, model: ModelRow) -> None:
    """Check that the prompt can be used with the model.

    Raises:
        PromptMismatch: it has another width, or is a target prompt of another model.
    """
    if prompt.width != model.hidden_size:
        raise PromptMismatch(
            f"The prompt has width {prompt.width}, but the model {model.name} has width {model.hidden_size}.",
            width=prompt.width,
            hidden_size=model.hidden_size,
        )
    if prompt.role is PromptRole.TARGET and prompt.model_hash != model.hash:
        raise PromptMismatch(f"The prompt {prompt.id} was made for another model, not for {model.name}.")


def check_task(prompt: PromptRow | None, task: TaskSpec | None) -> None:
    """Check that there is exactly one task, and that it is valid.

    Raises:
        InvalidInput: neither a prompt nor a task, or both.
        TaskInvalid: the task is invalid.
    """
    if (prompt is None) == (task is None):
        raise InvalidInput("Give either a prompt, which contains its task, or a task.")
    if task is not None:
        Task.from_spec(task)
