"""The distillation job."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from sqlalchemy import select
from sqlalchemy.orm import Session

from post_server.datasets.service import find_dataset
from post_server.db.tables import ModelRow
from post_server.distillations.follower import write_config
from post_server.distillations.launcher import followers
from post_server.jobs.context import JobContext, Outcome
from post_server.models.service import add_model, find_model, model_facts
from post_shared.errors import Conflict
from post_shared.method.distillation.distil import distil
from post_shared.method.distillation.layer_search import LayerChoice
from post_shared.method.distillation.teacher_cache import CacheBudget
from post_shared.schemas.distillations import DistillationCreate, DistilOptions
from post_shared.schemas.models import ModelRole
from post_shared.training.distributed import ALONE, Group


def run_distil(context: JobContext) -> Outcome:
    """Target model + public text -> student (method §1)."""
    request = DistillationCreate.model_validate(context.job.request)
    with context.database.read() as session:
        source = find_model(session, request.target, ModelRole.TARGET)
        corpora = [find_dataset(session, name) for name in request.corpus]
        if session.scalar(select(ModelRow.id).where(ModelRow.name == request.name)):
            raise Conflict(f"A model named {request.name!r} already exists; choose another name.")
    paragraphs = [text for corpus in corpora for text in context.texts(corpus)]
    options, choices = request, list[LayerChoice]()
    target = context.load(source, for_training=True)
    with _group(context, source, target.dtype, options) as group:
        student = distil(
            target,
            paragraphs,
            options,
            on_progress=context.on_progress,
            checkpoint=context.checkpoint,
            checkpoint_seconds=context.settings.checkpoint_seconds,
            cache_budget=CacheBudget(context.settings.teacher_cache_bytes),
            group=group,
            chosen=choices.append,
        )
    folder = context.scratch / "student"
    student.save(folder)

    def save(session: Session) -> dict[str, Any]:
        facts = model_facts(student)
        row = add_model(
            session, context.store, folder, name=request.name, role=ModelRole.STUDENT, target_id=source.id, **facts
        )
        made = {"model_id": row.id, "name": row.name, "hash": row.hash, **_layers(choices[0])}
        return {**made, "precision": target.precision.document()}

    return save


def _group(
    context: JobContext, target: ModelRow, dtype: torch.dtype, options: DistilOptions
) -> AbstractContextManager[Group]:
    """One process per GPU that the job may use; with fewer than two GPUs, this process alone."""
    gpus = torch.cuda.device_count() if context.settings.device in {"auto", "cuda"} else 0
    size = min(gpus, options.rows // (options.gradient_accumulation_steps or 1))
    if size < 2:
        return nullcontext(ALONE)
    config = context.scratch / "follower.json"
    write_config(
        config,
        context.scratch / target.id,
        options,
        dtype=dtype,
        checkpoint=context.checkpoint,
        cache_bytes=context.settings.teacher_cache_bytes,
        cpu=False,
    )
    return followers(config, size)


def _layers(choice: LayerChoice) -> dict[str, Any]:
    """The student's layers, and the score of each pattern that a layer search tried, best first."""
    scores = sorted(choice.scores.items(), key=lambda pair: pair[1])
    tried = [{"layers": list(layers), "cos": round(score, 4)} for layers, score in scores]
    return {"layers": list(choice.kept), **({"tried": tried} if tried else {})}
