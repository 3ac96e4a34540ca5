"""What each kind of job does: fetch what it names, call the paper's function, hand over what it made."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import select
from sqlalchemy.orm import Session

from post_server.database import Database
from post_server.dataset_store import find_dataset
from post_server.ml.distillation import DistilConfig, distil
from post_server.ml.follower import write_order
from post_server.ml.layer_search import LayerChoice
from post_server.ml.loading import load_stored
from post_server.ml.measuring import measure
from post_server.ml.processes import ALONE, Group, followers
from post_server.ml.report_texts import attacked_texts, split_task
from post_server.ml.teacher_cache import CacheRoom
from post_server.ml.trade_off import trade_off
from post_server.ml.transfer import ALPHA_ROWS, TransferConfig, TransferResult, choose_alpha, transfer
from post_server.model_store import add_model, find_model, find_model_by_hash, materialise_model, model_facts
from post_server.prompt_store import add_prompt
from post_server.records import DatasetRow, JobRow, ModelRow, PromptRow
from post_server.reports import recorded_loss, report_document
from post_server.settings import Settings
from post_server.storage import BlobStore
from post_shared.data import Row, read_corpus, read_rows
from post_shared.errors import Conflict, InvalidInput, NotFound, PromptMismatch
from post_shared.language_model import LanguageModel
from post_shared.prompt_file import PromptFile, read_prompt, write_prompt
from post_shared.report_schemas import ReportCreate
from post_shared.schemas import (
    DatasetKind,
    DistillationCreate,
    EvaluationCreate,
    JobKind,
    ModelRole,
    PromptRole,
    TransferCreate,
)
from post_shared.soft_prompt import SoftPrompt
from post_shared.tasks import Task
from post_shared.training import Reporter

Outcome = Callable[[Session], dict[str, Any]]
"""Adds the rows that a job made and returns its result. It runs in the transaction that ends the job."""


@dataclass(frozen=True)
class Work:
    """A job with all that it may use. ``scratch`` is empty at first; ``checkpoint`` survives a lost process."""

    job: JobRow
    database: Database
    store: BlobStore
    settings: Settings
    report: Reporter
    checkpoint: Path
    scratch: Path

    def load(self, row: ModelRow, *, teaches: bool = False) -> LanguageModel:
        """A stored model, memory-mapped from links to its blobs; one that ``teaches`` computes in the fastest type."""
        folder = self.scratch / row.id
        if not folder.exists():
            materialise_model(self.store, row, folder)
        return load_stored(row, folder, self.settings, teaches=teaches)

    def texts(self, row: DatasetRow) -> list[str]:
        """The texts of a public dataset."""
        kind = "txt" if row.kind is DatasetKind.CORPUS else "jsonl"
        return read_corpus(self.store.local_path(row.sha256), format=kind)  # type: ignore[arg-type]

    def rows(self, row: DatasetRow) -> list[Row]:
        """The labelled rows of a public dataset."""
        if row.kind is not DatasetKind.ROWS:
            raise InvalidInput(f"the dataset {row.name} is a corpus; rows with labels are needed")
        return read_rows(self.store.local_path(row.sha256), format="jsonl")


def run_distil(work: Work) -> Outcome:
    """Target model + public text -> student (method §1)."""
    request = DistillationCreate.model_validate(work.job.request)
    with work.database.read() as session:
        source = find_model(session, request.target, ModelRole.TARGET)
        corpora = [find_dataset(session, name) for name in request.corpus]
        if session.scalar(select(ModelRow.id).where(ModelRow.name == request.name)):
            raise Conflict(f"There already is a model named {request.name!r}; choose another name.")
    paragraphs = [text for corpus in corpora for text in work.texts(corpus)]
    config, choices = DistilConfig.from_request(request), list[LayerChoice]()
    target = work.load(source, teaches=True)
    with _group(work, source, target.dtype, config) as group:
        student = distil(
            target,
            paragraphs,
            config,
            report=work.report,
            checkpoint=work.checkpoint,
            checkpoint_seconds=work.settings.checkpoint_seconds,
            room=CacheRoom(work.settings.teacher_cache_bytes),
            group=group,
            chosen=choices.append,
        )
    folder = work.scratch / "student"
    student.save(folder)

    def save(session: Session) -> dict[str, Any]:
        facts = model_facts(student)
        row = add_model(
            session, work.store, folder, name=request.name, role=ModelRole.STUDENT, target_id=source.id, **facts
        )
        return {"model_id": row.id, "name": row.name, "hash": row.hash, **_layers(choices[0])}

    return save


def _group(work: Work, target: ModelRow, dtype: torch.dtype, config: DistilConfig) -> AbstractContextManager[Group]:
    """All GPUs that the job may use, each with a process of its own; else this process alone."""
    gpus = torch.cuda.device_count() if work.settings.device in {"auto", "cuda"} else 0
    size = min(gpus, config.rows // (config.accumulate or 1))
    if size < 2:
        return nullcontext(ALONE)
    order = work.scratch / "order.json"
    write_order(
        order,
        work.scratch / target.id,
        config,
        dtype=dtype,
        checkpoint=work.checkpoint,
        cache_bytes=work.settings.teacher_cache_bytes,
        cpu=False,
    )
    return followers(order, size)


def _layers(choice: LayerChoice) -> dict[str, Any]:
    """The kept layers, and what a search found for each pattern, best first."""
    scores = sorted(choice.scores.items(), key=lambda pair: pair[1])
    tried = [{"layers": list(kept), "cos": round(score, 4)} for kept, score in scores]
    return {"layers": list(choice.kept), **({"tried": tried} if tried else {})}


def run_transfer(work: Work) -> Outcome:
    """Source prompt + public text -> target prompt (method §3)."""
    request = TransferCreate.model_validate(work.job.request)
    with work.database.read() as session:
        source = _prompt(session, request.prompt, PromptRole.SOURCE)
        target_row = find_model(session, request.target, ModelRole.TARGET)
        dataset = find_dataset(session, request.dataset)
        student_row = _student_of(session, source, target_row)
    file, task = _read(work, source)
    prompt = SoftPrompt(torch.from_numpy(file.embeddings))
    target, load_student = work.load(target_row, teaches=True), partial(work.load, student_row)
    alpha = request.alpha
    if alpha == "auto":
        most = {"max_rows": min(ALPHA_ROWS, request.max_rows), "max_length": request.max_length}
        alpha = choose_alpha(target, load_student(), task, prompt, work.rows(dataset), **most)
    moved = transfer(
        target,
        load_student,
        task,
        prompt,
        work.texts(dataset),
        TransferConfig.from_request(request, float(alpha)),
        report=work.report,
        checkpoint=work.checkpoint,
        checkpoint_seconds=work.settings.checkpoint_seconds,
    )
    # Post-processing of a private prompt costs nothing: the target prompt states the same (ε, δ).
    data = write_prompt(
        PromptFile(moved.prompt.embeddings.numpy(), target_row.hash, file.task, file.epsilon, file.delta)
    )
    return partial(_save_target_prompt, work, source, data, moved)


def _save_target_prompt(
    work: Work, source: PromptRow, data: bytes, moved: TransferResult, session: Session
) -> dict[str, Any]:
    row, _ = add_prompt(
        session,
        work.store,
        data,
        role=PromptRole.TARGET,
        owner_key_id=source.owner_key_id,
        source_id=source.id,
        max_bytes=work.settings.prompt_bytes,
    )
    losses = {"first_loss": moved.first_loss, "last_loss": moved.last_loss}  # none when all steps were done before
    known = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    chosen = {"chosen_step": moved.chosen_step, "held_out_loss": moved.held_out_loss}
    return {"prompt_id": row.id, "alpha": moved.alpha, "steps": moved.steps, **known, **chosen}


def run_evaluate(work: Work) -> Outcome:
    """Model, with or without a prompt, on labelled public rows."""
    request = EvaluationCreate.model_validate(work.job.request)
    with work.database.read() as session:
        row = find_model(session, request.model)
        dataset = find_dataset(session, request.dataset)
        asked = _prompt(session, request.prompt) if request.prompt else None
    prompt: torch.Tensor | None = None
    if asked is not None:
        file, task = _read(work, asked)
        prompt = torch.from_numpy(file.embeddings)
    elif request.task is not None:
        task = Task.from_form(request.task)
    else:
        raise InvalidInput("an evaluation needs a prompt or a task")
    rows = work.rows(dataset)[: request.max_rows]
    model = work.load(row)
    result = measure(model, task, rows, prompt, work.report)
    return lambda session: result


def run_report(work: Work) -> Outcome:
    """Student + public tasks and texts -> what it can do and what it leaks beside its target."""
    request = ReportCreate.model_validate(work.job.request)
    with work.database.read() as session:
        student = find_model(session, request.student, ModelRole.STUDENT)
        source = session.get_one(ModelRow, student.target_id)
        sets = [find_dataset(session, each.dataset) for each in request.tasks]
        members, others = (
            [find_dataset(session, name) for name in names] for names in (request.members, request.non_members)
        )
        recorded = recorded_loss(session, student)
    forms = [Task.from_form(each.task) for each in request.tasks]
    tasks = [split_task(row.name, task, work.rows(row), request) for row, task in zip(sets, forms, strict=True)]
    target = work.load(source)
    seen, unseen = ([text for row in side for text in work.texts(row)] for side in (members, others))
    found = trade_off(
        target,
        work.load(student),
        tasks,
        *attacked_texts(target, seen, unseen, request),
        request,
        report=work.report,
        checkpoint=work.checkpoint,
        checkpoint_seconds=work.settings.checkpoint_seconds,
    )
    document = report_document(work.job, source, student, recorded, found)
    return lambda session: document.model_dump(mode="json")


RUNNERS: dict[JobKind, Callable[[Work], Outcome]] = {
    JobKind.DISTIL: run_distil,
    JobKind.TRANSFER: run_transfer,
    JobKind.EVALUATE: run_evaluate,
    JobKind.REPORT: run_report,
}


def _prompt(session: Session, prompt_id: str, role: PromptRole | None = None) -> PromptRow:
    row = session.get(PromptRow, prompt_id)
    if row is None or (role is not None and row.role is not role):
        raise NotFound(f"There is no {role.value + ' ' if role else ''}prompt {prompt_id!r}.", prompt=prompt_id)
    return row


def _student_of(session: Session, prompt: PromptRow, target: ModelRow) -> ModelRow:
    """The model that the prompt was tuned on; it has to come from the target model."""
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


def _read(work: Work, row: PromptRow) -> tuple[PromptFile, Task]:
    file = read_prompt(work.store.read(row.sha256), max_bytes=work.settings.prompt_bytes)
    return file, Task.from_form(file.task)
