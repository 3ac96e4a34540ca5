"""The job of an evaluation: a model, with or without a prompt, on labelled public rows."""

from __future__ import annotations

import torch

from post_server.datasets.service import find_dataset
from post_server.jobs.context import JobContext, Outcome, find_stored_prompt, read_stored_prompt
from post_server.models.service import find_model
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput
from post_shared.inference.measuring import measure
from post_shared.schemas.evaluations import EvaluationCreate


def run_evaluate(context: JobContext) -> Outcome:
    """Model, with or without a prompt, on labelled public rows."""
    request = EvaluationCreate.model_validate(context.job.request)
    with context.database.read() as session:
        row = find_model(session, request.model)
        dataset = find_dataset(session, request.dataset)
        asked = find_stored_prompt(session, request.prompt) if request.prompt else None
    prompt: torch.Tensor | None = None
    if asked is not None:
        file, task = read_stored_prompt(context, asked)
        prompt = torch.from_numpy(file.embeddings)
    elif request.task is not None:
        task = Task.from_spec(request.task)
    else:
        raise InvalidInput("an evaluation needs a prompt or a task")
    rows = context.rows(dataset)[: request.max_rows]
    model = context.load(row)
    result = measure(model, task, rows, prompt, context.on_progress)
    return lambda session: result
