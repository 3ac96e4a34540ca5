"""The transfer job."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from sqlalchemy.orm import Session

from post_server.datasets.service import find_dataset
from post_server.db.tables import ModelRow, PromptRow
from post_server.jobs.context import JobContext, Outcome, find_stored_prompt, read_stored_prompt
from post_server.models.service import find_model, find_model_by_hash
from post_server.prompts.service import add_prompt
from post_shared.errors import PromptMismatch
from post_shared.files.prompt_file import PromptFile, write_prompt
from post_shared.method.transfer.transfer import ALPHA_ROWS, TransferResult, choose_alpha, transfer
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.schemas.models import ModelRole
from post_shared.schemas.prompts import PromptRole
from post_shared.schemas.transfers import TransferCreate


def run_transfer(context: JobContext) -> Outcome:
    """Source prompt + public text -> target prompt (method §3)."""
    request = TransferCreate.model_validate(context.job.request)
    with context.database.read() as session:
        source = find_stored_prompt(session, request.prompt, PromptRole.SOURCE)
        target_row = find_model(session, request.target, ModelRole.TARGET)
        dataset = find_dataset(session, request.dataset)
        student_row = _student_of(session, source, target_row)
    file, task = read_stored_prompt(context, source)
    prompt = SoftPrompt(torch.from_numpy(file.embeddings))
    target, load_student = context.load(target_row, for_training=True), partial(context.load, student_row)
    alpha = request.alpha
    if alpha == "auto":
        limits = {"max_rows": min(ALPHA_ROWS, request.max_rows), "max_length": request.max_length}
        alpha = choose_alpha(target, load_student(), task, prompt, context.rows(dataset), **limits)
    result = transfer(
        target,
        load_student,
        task,
        prompt,
        context.texts(dataset),
        request.replace(alpha=alpha),
        on_progress=context.on_progress,
        checkpoint=context.checkpoint,
        checkpoint_seconds=context.settings.checkpoint_seconds,
    )
    # Post-processing costs no privacy budget: the target prompt has the (ε, δ) of the source prompt.
    data = write_prompt(
        PromptFile(result.prompt.embeddings.numpy(), target_row.hash, file.task, file.epsilon, file.delta)
    )
    return partial(_save_target_prompt, context, source, data, result, target.precision.document())


def _save_target_prompt(
    context: JobContext,
    source: PromptRow,
    data: bytes,
    result: TransferResult,
    precision: dict[str, str],
    session: Session,
) -> dict[str, Any]:
    row, _ = add_prompt(
        session,
        context.store,
        data,
        role=PromptRole.TARGET,
        owner_key_id=source.owner_key_id,
        source_id=source.id,
        max_bytes=context.settings.prompt_bytes,
    )
    losses = {"first_loss": result.first_loss, "last_loss": result.last_loss}  # NaN if all steps were done before
    finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    chosen = {"chosen_step": result.chosen_step, "held_out_loss": result.held_out_loss}
    made = {"prompt_id": row.id, "alpha": result.alpha, "steps": result.steps, **finite, **chosen}
    return {**made, "precision": precision}


def _student_of(session: Session, prompt: PromptRow, target: ModelRow) -> ModelRow:
    """The student that the prompt was tuned on. Raises :class:`PromptMismatch` unless it comes from the target."""
    student = find_model_by_hash(session, prompt.model_hash)
    if student is None:
        raise PromptMismatch(f"No model here has the hash {prompt.model_hash}.", model_hash=prompt.model_hash)
    origin = session.get(ModelRow, student.target_id) if student.target_id else None
    if origin is not None and origin.hash != target.hash:
        raise PromptMismatch(
            f"The prompt was tuned on {student.name}, a student of {origin.name}, not of {target.name}; "
            f"transfer to {origin.name}, or tune on a student of {target.name}."
        )
    return student
