"""The evaluation job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from post_server.datasets.service import find_dataset
from post_server.jobs.context import JobContext, Outcome, find_stored_prompt, read_stored_prompt
from post_server.models.service import find_model
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput
from post_shared.inference.evaluation import evaluate
from post_shared.schemas.evaluations import EvaluationCreate


def run_evaluate(context: JobContext) -> Outcome:
    """Evaluate a model, with or without a prompt, on labelled public rows."""
    request = EvaluationCreate.model_validate(context.job.request)
    with context.database.read() as session:
        row = find_model(session, request.model)
        dataset = find_dataset(session, request.dataset)
        prompt_row = find_stored_prompt(session, request.prompt) if request.prompt else None
    prompt: torch.Tensor | None = None
    if prompt_row is not None:
        file, task = read_stored_prompt(context, prompt_row)
        prompt = torch.from_numpy(file.embeddings)
    elif request.task is not None:
        task = Task.from_spec(request.task)
    else:
        raise InvalidInput("an evaluation needs a prompt or a task")
    rows = context.rows(dataset)[: request.max_rows]
    model = context.load(row)
    _check_rows(task, rows)
    result = evaluate(model, task, rows, prompt, on_progress=context.on_progress)
    return lambda session: asdict(result)


def _check_rows(task: Task, rows: Sequence[Row]) -> None:
    """
    Raises:
        InvalidInput: a row without a label, or a label that the task doesn't have.
    """
    if any(row.label is None for row in rows):
        raise InvalidInput("an evaluation needs labelled rows; this dataset has rows without a label")
    unknown = sorted({str(row.label) for row in rows} - set(task.labels))
    if unknown and not task.is_generation:
        raise InvalidInput(f"the dataset has labels that the task doesn't have: {', '.join(unknown[:10])}")
