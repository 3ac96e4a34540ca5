"""Distil a target model into a student: Φt -> Φs (method §1, Eq. 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from post_shared.errors import InvalidInput
from post_shared.method.distillation.corpus import Corpus, corpus_of, prepare_corpus
from post_shared.method.distillation.layer_search import LayerChoice, LayerSearch, SearchProgress, search_layers
from post_shared.method.distillation.layer_selection import chosen_layers
from post_shared.method.distillation.micro_batching import check_student_fits, plan_micro_batches
from post_shared.method.distillation.objective import Objective
from post_shared.method.distillation.student_init import STUDENT_INITS, TargetStates
from post_shared.method.distillation.teacher_cache import CacheBudget, TeacherCache
from post_shared.method.distillation.trainer import DistillationStep, EarlyStopping, Student, Training
from post_shared.model.language_model import LanguageModel
from post_shared.model.layers import check_loads, copy_student
from post_shared.schemas.distillations import DistilOptions
from post_shared.training.checkpoint import Checkpoint, fingerprint
from post_shared.training.distributed import ALONE, Group
from post_shared.training.loop import run_steps
from post_shared.training.progress import Progress, ProgressCallback, ignore
from post_shared.training.schedule import Clock, warm_then_linear

WARM_UP = 0.05
SEARCH_TOKENS = 4_096
"""Tokens that each candidate of a layer search is fitted on, and as many that it is scored on."""


def initial_student(
    target: LanguageModel,
    corpus: Corpus,
    options: DistilOptions,
    student_init: str,
    on_progress: ProgressCallback = ignore,
    kept: Sequence[int] | None = None,
) -> LanguageModel:
    """The student before distillation: copied layers, initialised by :data:`STUDENT_INITS` ``[student_init]``.

    ``kept`` are the layers; by default those that ``options`` name.
    """
    if kept is None:
        kept = chosen_layers(_keep_layers(options), target.layers, options.layer_pattern)
    student = copy_student(target, kept)
    STUDENT_INITS[student_init](
        student, kept, TargetStates(target, _init_batches(corpus, options, options.init_tokens), on_progress)
    )
    return student


def choose_layers(
    target: LanguageModel,
    corpus: Corpus,
    options: DistilOptions,
    on_progress: ProgressCallback = ignore,
    folder: Path | None = None,
) -> LayerChoice:
    """The layers to keep; with ``folder``, an interrupted search resumes from its saved scores."""
    if options.layer_pattern != "search" or not isinstance(options.keep_layers, int):
        return LayerChoice(tuple(chosen_layers(_keep_layers(options), target.layers, options.layer_pattern)))
    search = LayerSearch(target, options.student_init, *_search_split(corpus, options))
    run_id = (options.keep_layers, options.student_init, options.seed, options.rows, corpus.digest, target)
    progress = SearchProgress(folder, *run_id) if folder else None
    return search_layers(
        search.score,
        options.keep_layers,
        target.layers,
        known=progress.read() if progress else None,
        save=progress.write if progress else lambda _: None,
        on_progress=on_progress,
    )


def distil(
    target: LanguageModel,
    paragraphs: Sequence[str],
    options: DistilOptions,
    *,
    on_progress: ProgressCallback = ignore,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    cache_budget: CacheBudget | None = None,
    group: Group = ALONE,
    chosen: Callable[[LayerChoice], None] = lambda choice: None,
) -> LanguageModel:
    """Train a student of ``target`` on public text with Eq. 1; returns it frozen.

    ``cache_budget`` bounds the target's hidden states that are stored beside the checkpoint when the corpus is passed
    more than once. With a ``group``, this process leads and the others call :func:`follow`. ``chosen`` is called with
    the kept layers.

    Raises:
        InvalidInput: layers, ``student_init`` or ``sequence_length`` that don't fit the model.
        DataInvalid: too little text.
        OutOfMemory: the student's weights, gradients and AdamW state, with the activations of one sequence, don't fit.
        Cancelled: raised by ``on_progress``; the state is saved first.
    """
    if options.sequence_length > target.max_length:
        raise InvalidInput(
            f"sequences of {options.sequence_length} tokens don't fit the model's {target.max_length} positions; "
            "lower sequence_length"
        )
    on_progress(Progress(0, 1, "corpus"))
    corpus = prepare_corpus(
        target, paragraphs, options.sequence_length, checkpoint, templates=options.templates, seed=options.seed
    )
    choice = choose_layers(target, corpus, options, on_progress, checkpoint)
    chosen(choice)
    run_id = fingerprint(options, choice.kept, corpus.digest, target)
    saved = Checkpoint(checkpoint, run_id, checkpoint_seconds) if checkpoint else None
    check_student_fits(target, choice.kept)
    resumes = saved is not None and saved.begun()  # the saved weights replace the initial ones, whatever these are
    init = "copy" if resumes else options.student_init
    model = initial_student(target, corpus, options, init, on_progress, choice.kept)
    check_loads(model)
    cache = _teacher_cache(target, corpus, options, checkpoint, cache_budget)
    step = _distillation_step(target, model, choice.kept, corpus, options, group, cache)
    step = replace(step, gradient_accumulation_steps=plan_micro_batches(step, options.gradient_accumulation_steps))
    _send_plan(group, corpus, choice.kept, step.gradient_accumulation_steps)
    early_stopping = EarlyStopping()
    run_steps(
        _update(step, options, early_stopping),
        Training(step.student, early_stopping),
        steps=options.steps,
        seconds=options.max_minutes * 60 if options.max_minutes else None,
        stage="distil",
        on_progress=on_progress,
        checkpoint=saved,
        converged=early_stopping.reached if options.early_stopping else lambda: False,
    )
    group.end()
    if cache:
        cache.remove()
    model.model.requires_grad_(False)
    return model


def follow(
    target: LanguageModel,
    options: DistilOptions,
    group: Group,
    *,
    checkpoint: Path | None = None,
    cache_budget: CacheBudget | None = None,
) -> None:
    """Compute a follower's gradients in the distillation that another process leads with :func:`distil`, to its end."""
    corpus, kept, accumulation_steps = _receive_plan(group, target, answers=bool(options.templates))
    cache = _teacher_cache(target, corpus, options, checkpoint, cache_budget)
    step = _distillation_step(target, copy_student(target, kept), kept, corpus, options, group, cache)
    step = replace(step, gradient_accumulation_steps=accumulation_steps)
    while (number := group.next_step()) is not None:
        step.gradients(number)


def _send_plan(group: Group, corpus: Corpus, kept: Sequence[int], accumulation_steps: int) -> None:
    """Send the followers the corpus, the kept layers and the number of micro-batches per process."""
    if group.size > 1:
        count, length = corpus.blocks.shape
        group.send([count, length, len(kept), accumulation_steps])
        group.send(kept)
        group.broadcast([torch.from_numpy(corpus.blocks)])


def _receive_plan(group: Group, target: LanguageModel, *, answers: bool) -> tuple[Corpus, list[int], int]:
    """A follower's side of :func:`_send_plan`."""
    count, length, layers, accumulation_steps = group.receive(4)
    kept = group.receive(layers)
    blocks = torch.empty(count, length, dtype=torch.int32)
    group.broadcast([blocks])
    return corpus_of(target, blocks.numpy().astype(np.int32), answers=answers), kept, accumulation_steps


def _distillation_step(
    target: LanguageModel,
    model: LanguageModel,
    kept: Sequence[int],
    corpus: Corpus,
    options: DistilOptions,
    group: Group,
    cache: TeacherCache | None,
) -> DistillationStep:
    student = Student(
        model,
        learning_rate=options.learning_rate,
        freeze_head=options.freeze_head,
        freeze_embeddings=options.freeze_embeddings,
    )
    objective = Objective(target, model, options.temperature, kept=kept, alignment=options.alignment, cache=cache)
    return DistillationStep(
        student, objective, corpus, group, options.rows, options.gradient_accumulation_steps or 1, options.seed
    )


def _teacher_cache(
    target: LanguageModel, corpus: Corpus, options: DistilOptions, folder: Path | None, cache_budget: CacheBudget | None
) -> TeacherCache | None:
    """None where cached states would never be read again: a masked model gets other inputs in each pass, alignment
    needs the target's inner states, and training may end within the first pass over the corpus."""
    one_pass = options.steps is not None and options.steps * options.rows <= len(corpus.blocks)
    if folder is None or cache_budget is None or one_pass or target.kind == "masked" or options.alignment:
        return None
    return TeacherCache(folder, corpus.digest, corpus.blocks.shape, target, cache_budget)


def _update(
    step: DistillationStep, options: DistilOptions, early_stopping: EarlyStopping
) -> Callable[[Clock], dict[str, float]]:
    """The ``update`` of :func:`post_shared.training.loop.run_steps`; it also hands each loss to ``early_stopping``."""
    began, tokens = time.monotonic(), 0

    def update(clock: Clock) -> dict[str, float]:
        nonlocal tokens
        step.group.announce(clock.step)
        losses = step.gradients(clock.step)
        step.student.step(options.learning_rate * warm_then_linear(max(clock.done, 1e-3), WARM_UP))
        tokens += min(options.rows, len(step.corpus.blocks)) * options.sequence_length
        early_stopping.add(losses["loss"])
        return {**losses, "tokens_per_second": tokens / (time.monotonic() - began)}

    return update


def _init_batches(corpus: Corpus, options: DistilOptions, tokens: int) -> list[torch.Tensor]:
    """The first batches of the corpus, at most ``tokens`` tokens, but at least one batch."""
    total = -(-len(corpus.blocks) // options.rows)
    count = min(total, max(1, tokens // (options.rows * options.sequence_length)))
    return [corpus.batch(step, options.rows, options.seed) for step in range(count)]


def _search_split(corpus: Corpus, options: DistilOptions) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(batches that the candidates of a search are fitted on, blocks that they are scored on); disjoint if the corpus
    has at least two blocks."""
    order = corpus.block_indices(0, len(corpus.blocks), options.seed)
    limit = max(options.rows, SEARCH_TOKENS // options.sequence_length)
    held_out = min(limit, len(order) // 2) or 1
    fitted = order[: min(limit, max(1, len(order) - held_out))]
    batches = [corpus.take(fitted[start : start + options.rows]) for start in range(0, len(fitted), options.rows)]
    return batches, corpus.take(order[-held_out:])


def _keep_layers(options: DistilOptions) -> int | list[int]:
    return options.keep_layers if isinstance(options.keep_layers, int) else list(options.keep_layers)
