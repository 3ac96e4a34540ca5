"""Validation of an evaluation request before its job is queued."""

from __future__ import annotations

from sqlalchemy.orm import Session

from post_server.datasets.service import check_labelled, find_dataset
from post_server.db.tables import ApiKeyRow
from post_server.models.service import find_model
from post_server.prompts.service import check_prompt_fits, check_task, visible_prompt
from post_shared.schemas.evaluations import EvaluationCreate


def check_evaluation(session: Session, caller: ApiKeyRow, request: EvaluationCreate) -> None:
    """Check the request against the stored model, dataset and prompt.

    Raises:
        NotFound: no such model, dataset or prompt.
        InvalidInput: a dataset without labels, or not exactly one of prompt and task.
        TaskInvalid: the task is invalid.
        PromptMismatch: the prompt can't be used with the model.
    """
    model = find_model(session, request.model)
    check_labelled(find_dataset(session, request.dataset))
    prompt = None if request.prompt is None else visible_prompt(session, caller, request.prompt)
    check_task(prompt, request.task)
    if prompt is not None:
        check_prompt_fits(prompt, model)
