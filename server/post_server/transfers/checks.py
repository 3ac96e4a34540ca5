"""Validation of a transfer request before its job is queued."""

from __future__ import annotations

from sqlalchemy.orm import Session

from post_server.datasets.service import check_labelled, find_dataset
from post_server.db.tables import ApiKeyRow
from post_server.models.service import find_model
from post_server.prompts.service import check_prompt_fits, visible_prompt
from post_shared.errors import PromptMismatch
from post_shared.schemas.models import ModelRole
from post_shared.schemas.prompts import PromptRole
from post_shared.schemas.transfers import TransferCreate


def check_transfer(session: Session, caller: ApiKeyRow, request: TransferCreate) -> None:
    """Check the request against the stored prompt, model and dataset.

    Raises:
        NotFound: no such prompt, target model or dataset.
        PromptMismatch: not a source prompt that was tuned on a student of the target.
        InvalidInput: alpha is to be chosen on a dataset without labels.
    """
    prompt = visible_prompt(session, caller, request.prompt)
    target = find_model(session, request.target, ModelRole.TARGET)
    dataset = find_dataset(session, request.dataset)
    if prompt.role is not PromptRole.SOURCE:
        raise PromptMismatch(f"The prompt {prompt.id} is already a target prompt; transfer its source prompt.")
    student = find_model(session, prompt.model_id)
    if student.role is not ModelRole.STUDENT or student.target_id != target.id:
        raise PromptMismatch(f"The prompt {prompt.id} was tuned on {student.name}, not on a student of {target.name}.")
    check_prompt_fits(prompt, target)
    if request.alpha == "auto":
        check_labelled(dataset)
