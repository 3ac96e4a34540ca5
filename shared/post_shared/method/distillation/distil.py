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
from post_shared.method.distillation.layer_search import LayerChoice, LayerSearch, SearchNotes, search_layers
from post_shared.method.distillation.layer_selection import chosen_layers
from post_shared.method.distillation.micro_batching import check_student, plan_parts
from post_shared.method.distillation.objective import Objective
from post_shared.method.distillation.student_init import STUDENT_INITS, TargetStates
from post_shared.method.distillation.teacher_cache import CacheBudget, TeacherCache
from post_shared.method.distillation.trainer import Descent, EarlyStopping, Student, Training
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
"""Of a search: text that each candidate is fitted on, and as much that it is scored on."""


def start_student(
    target: LanguageModel,
    corpus: Corpus,
    options: DistilOptions,
    start: str,
    on_progress: ProgressCallback = ignore,
    kept: Sequence[int] | None = None,
) -> LanguageModel:
    """The student before distillation: layers copied, and prepared by the start of that name.

    ``kept`` are the layers, where they were searched for; else those of the configuration.
    """
    if kept is None:
        kept = chosen_layers(_listed(options), target.layers, options.layer_pattern)
    student = copy_student(target, kept)
    STUDENT_INITS[start](
        student, kept, TargetStates(target, _first_blocks(corpus, options, options.init_tokens), on_progress)
    )
    return student


def choose_layers(
    target: LanguageModel,
    corpus: Corpus,
    options: DistilOptions,
    on_progress: ProgressCallback = ignore,
    folder: Path | None = None,
) -> LayerChoice:
    """The layers to keep; with ``folder``, an interrupted search goes on from what it found."""
    if options.layer_pattern != "search" or not isinstance(options.keep_layers, int):
        return LayerChoice(tuple(chosen_layers(_listed(options), target.layers, options.layer_pattern)))
    search = LayerSearch(target, options.student_init, *_apart(corpus, options))
    run_id = (options.keep_layers, options.student_init, options.seed, options.rows, corpus.digest, target)
    notes = SearchNotes(folder, *run_id) if folder else None
    return search_layers(
        search.score,
        options.keep_layers,
        target.layers,
        known=notes.read() if notes else None,
        keep=notes.write if notes else lambda _: None,
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
    """Train a student of ``target`` on public text by Eq. 1; returns it frozen.

    ``room`` is for the target's hidden states, beside the checkpoint, when the corpus is passed more than once.
    With a ``group``, this process leads it and the others call :func:`follow`. ``chosen`` hears which layers are kept.

    Raises:
        InvalidInput: layers, start or length that don't fit the model.
        DataInvalid: too little text.
        OutOfMemory: the student's weights, gradients and AdamW's state, with one sequence's pass, don't fit.
        Cancelled: raised by ``on_progress``; the state is kept first.
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
    kept = Checkpoint(checkpoint, run_id, checkpoint_seconds) if checkpoint else None
    check_student(target, choice.kept)
    begun = kept is not None and kept.begun()  # its weights replace whatever the student would start from
    model = start_student(target, corpus, options, "copy" if begun else options.student_init, on_progress, choice.kept)
    check_loads(model)
    cache = _cache(target, corpus, options, checkpoint, cache_budget)
    descent, plateau = _descent(target, model, choice.kept, corpus, options, group, cache), EarlyStopping()
    descent = replace(descent, gradient_accumulation_steps=plan_parts(descent, options.gradient_accumulation_steps))
    _tell_followers(group, corpus, choice.kept, descent.gradient_accumulation_steps)
    run_steps(
        _update(descent, options, plateau),
        Training(descent.student, plateau),
        steps=options.steps,
        seconds=options.max_minutes * 60 if options.max_minutes else None,
        stage="distil",
        on_progress=on_progress,
        checkpoint=kept,
        converged=plateau.reached if options.early_stopping else lambda: False,
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
    """Take part in the distillation that another process leads by :func:`distil`, until it is done."""
    corpus, kept, accumulate = _told_by_leader(group, target, answers=bool(options.templates))
    cache = _cache(target, corpus, options, checkpoint, cache_budget)
    descent = _descent(target, copy_student(target, kept), kept, corpus, options, group, cache)
    descent = replace(descent, gradient_accumulation_steps=accumulate)
    while (step := group.called()) is not None:
        descent.gradients(step)


def _tell_followers(group: Group, corpus: Corpus, kept: Sequence[int], accumulate: int) -> None:
    """The corpus, the kept layers, and in how many parts each process takes its share of a batch."""
    if group.size > 1:
        count, length = corpus.blocks.shape
        group.tell([count, length, len(kept), accumulate])
        group.tell(kept)
        group.share([torch.from_numpy(corpus.blocks)])


def _told_by_leader(group: Group, target: LanguageModel, *, answers: bool) -> tuple[Corpus, list[int], int]:
    """What :func:`_tell_followers` told."""
    count, length, layers, accumulate = group.told(4)
    kept = group.told(layers)
    blocks = torch.empty(count, length, dtype=torch.int32)
    group.share([blocks])
    return corpus_of(target, blocks.numpy().astype(np.int32), answers=answers), kept, accumulate


def _descent(
    target: LanguageModel,
    model: LanguageModel,
    kept: Sequence[int],
    corpus: Corpus,
    options: DistilOptions,
    group: Group,
    cache: TeacherCache | None,
) -> Descent:
    student = Student(
        model,
        learning_rate=options.learning_rate,
        freeze_head=options.freeze_head,
        freeze_embeddings=options.freeze_embeddings,
    )
    objective = Objective(target, model, options.temperature, kept=kept, alignment=options.alignment, cache=cache)
    return Descent(
        student, objective, corpus, group, options.rows, options.gradient_accumulation_steps or 1, options.seed
    )


def _cache(
    target: LanguageModel, corpus: Corpus, options: DistilOptions, folder: Path | None, cache_budget: CacheBudget | None
) -> TeacherCache | None:
    """None where states would be of no use again: masked models read other tokens in each pass, alignment needs what
    is inside the target, and so many steps may end before a second pass."""
    once = options.steps is not None and options.steps * options.rows <= len(corpus.blocks)
    if folder is None or cache_budget is None or once or target.kind == "masked" or options.alignment:
        return None
    return TeacherCache(folder, corpus.digest, corpus.blocks.shape, target, cache_budget)


def _update(descent: Descent, options: DistilOptions, plateau: EarlyStopping) -> Callable[[Clock], dict[str, float]]:
    """One step of distillation, as the training loop calls it; the loss also goes to ``plateau``."""
    began, tokens = time.monotonic(), 0

    def update(clock: Clock) -> dict[str, float]:
        nonlocal tokens
        descent.group.call(clock.step)
        values = descent.gradients(clock.step)
        descent.student.step(options.learning_rate * warm_then_linear(max(clock.done, 1e-3), WARM_UP))
        tokens += min(options.rows, len(descent.corpus.blocks)) * options.sequence_length
        plateau.add(values["loss"])
        return {**values, "tokens_per_second": tokens / (time.monotonic() - began)}

    return update


def _first_blocks(corpus: Corpus, options: DistilOptions, tokens: int) -> list[torch.Tensor]:
    """The first batches, up to so many tokens; at least one."""
    every = -(-len(corpus.blocks) // options.rows)
    count = min(every, max(1, tokens // (options.rows * options.sequence_length)))
    return [corpus.batch(step, options.rows, options.seed) for step in range(count)]


def _apart(corpus: Corpus, options: DistilOptions) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(batches that the starts of a search are fitted on, block rows that they are scored on), none in both as long as
    there are two blocks."""
    order = corpus.numbers(0, len(corpus.blocks), options.seed)
    most = max(options.rows, SEARCH_TOKENS // options.sequence_length)
    held = min(most, len(order) // 2) or 1
    fitted = order[: min(most, max(1, len(order) - held))]
    batches = [corpus.rows(fitted[at : at + options.rows]) for at in range(0, len(fitted), options.rows)]
    return batches, corpus.rows(order[-held:])


def _listed(options: DistilOptions) -> int | list[int]:
    return options.keep_layers if isinstance(options.keep_layers, int) else list(options.keep_layers)
