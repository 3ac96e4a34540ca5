"""Distil a target model into a student: Φt -> Φs (method §1, Eq. 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

import torch

from post_server.ml.corpus import Corpus, prepare_corpus
from post_server.ml.descent import Descent, Plateau, Student, Training
from post_server.ml.distil_memory import check_student, plan_parts
from post_server.ml.layer_search import LayerChoice, LayerSearch, SearchNotes, search_layers
from post_server.ml.layers import PATTERNS, check_loads, chosen_layers, copy_student
from post_server.ml.objective import Objective
from post_server.ml.processes import ALONE, Group
from post_server.ml.start import STARTS, TargetStates
from post_server.ml.teacher_cache import CacheRoom, TeacherCache
from post_shared.clock import Clock, warm_then_linear
from post_shared.errors import InvalidInput
from post_shared.language_model import LanguageModel
from post_shared.schemas import DistillationCreate
from post_shared.training import Checkpoint, Progress, Reporter, fingerprint, ignore, run_steps

WARM_UP = 0.05
SEARCH_TOKENS = 4_096
"""Of a search: text that each candidate is fitted on, and as much that it is scored on."""


@dataclass(frozen=True)
class DistilConfig:
    """How to distil; the defaults are those of :class:`post_shared.schemas.DistillationCreate`."""

    keep_layers: tuple[int, ...] | int = 8
    layer_pattern: str = "front"
    start: str = "fold"
    answer_forms: tuple[str, ...] = ()
    freeze_head: bool = True
    freeze_embeddings: bool = True
    steps: int | None = None
    minutes: float | None = None
    plateau: bool = False
    learning_rate: float = 1e-3
    alignment: float = 0.0
    batch_tokens: int = 512
    accumulate: int | None = None
    """Parts in which each process takes its share of a batch; None: as few as the memory allows."""
    sequence_length: int = 64
    start_tokens: int = 15_000
    temperature: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise InvalidInput(f"there is no start {self.start!r}; there are: {', '.join(STARTS)}")
        if self.steps is None and self.minutes is None:
            raise InvalidInput("say how long to distil: steps, minutes or both")
        numbers = (self.minutes, self.learning_rate, self.temperature)
        if any(each is not None and not (isfinite(each) and each > 0) for each in numbers):
            raise InvalidInput("minutes, learning rate and temperature are finite numbers above 0")
        if min(self.sequence_length, 1 if self.steps is None else self.steps) < 1:
            raise InvalidInput("steps and the length of a sequence are at least 1")
        if self.sequence_length > self.batch_tokens:
            raise InvalidInput("batch_tokens holds at least one sequence")
        if self.accumulate is not None and not 1 <= self.accumulate <= self.rows:
            raise InvalidInput(f"accumulate is 1 to {self.rows}: a batch has {self.rows} sequences to take in turn")
        if self.alignment < 0:
            raise InvalidInput(f"alignment is a weight of 0 or more, not {self.alignment}")
        if self.layer_pattern not in {*PATTERNS, "search"}:
            raise InvalidInput(f"layer_pattern is search or one of {', '.join(PATTERNS)}, not {self.layer_pattern!r}")
        if not isinstance(self.keep_layers, int) and self.layer_pattern != "front":
            raise InvalidInput("layer_pattern spreads a number of layers; keep_layers lists them already")

    @property
    def rows(self) -> int:
        """Sequences in a batch."""
        return self.batch_tokens // self.sequence_length

    @classmethod
    def from_request(cls, request: DistillationCreate) -> DistilConfig:
        keep = request.keep_layers
        names = ("start", "freeze_head", "freeze_embeddings", "steps", "minutes", "plateau", "learning_rate")
        more = ("layer_pattern", "alignment", "batch_tokens", "accumulate", "sequence_length", "seed")
        return cls(
            keep_layers=keep if isinstance(keep, int) else tuple(keep),
            answer_forms=tuple(request.answer_forms),
            **{name: getattr(request, name) for name in (*names, *more)},
        )


def start_student(
    target: LanguageModel,
    corpus: Corpus,
    config: DistilConfig,
    start: str,
    report: Reporter = ignore,
    kept: Sequence[int] | None = None,
) -> LanguageModel:
    """The student before distillation: layers copied, and prepared by the start of that name.

    ``kept`` are the layers, where they were searched for; else those of the configuration.
    """
    if kept is None:
        kept = chosen_layers(_listed(config), target.layers, config.layer_pattern)
    student = copy_student(target, kept)
    STARTS[start](student, kept, TargetStates(target, _first_blocks(corpus, config, config.start_tokens), report))
    return student


def choose_layers(
    target: LanguageModel, corpus: Corpus, config: DistilConfig, report: Reporter = ignore, folder: Path | None = None
) -> LayerChoice:
    """The layers to keep; with ``folder``, an interrupted search goes on from what it found."""
    if config.layer_pattern != "search" or not isinstance(config.keep_layers, int):
        return LayerChoice(tuple(chosen_layers(_listed(config), target.layers, config.layer_pattern)))
    search = LayerSearch(target, config.start, *_apart(corpus, config))
    work = (config.keep_layers, config.start, config.seed, config.rows, corpus.digest, target.model)
    notes = SearchNotes(folder, *work) if folder else None
    return search_layers(
        search.score,
        config.keep_layers,
        target.layers,
        known=notes.read() if notes else None,
        keep=notes.write if notes else lambda _: None,
        report=report,
    )


def distil(
    target: LanguageModel,
    paragraphs: Sequence[str],
    config: DistilConfig,
    *,
    report: Reporter = ignore,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    room: CacheRoom | None = None,
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
        Cancelled: raised by ``report``; the state is kept first.
    """
    if config.sequence_length > target.max_length:
        raise InvalidInput(
            f"sequences of {config.sequence_length} tokens don't fit the model's {target.max_length} positions; "
            "lower sequence_length"
        )
    report(Progress(0, 1, "corpus"))
    corpus = prepare_corpus(
        target, paragraphs, config.sequence_length, checkpoint, answer_forms=config.answer_forms, seed=config.seed
    )
    choice = choose_layers(target, corpus, config, report, checkpoint)
    chosen(choice)
    work = fingerprint(config, choice.kept, corpus.digest, target.model)
    kept = Checkpoint(checkpoint, work, checkpoint_seconds) if checkpoint else None
    check_student(target, choice.kept)
    begun = kept is not None and kept.begun()  # its weights replace whatever the student would start from
    model = start_student(target, corpus, config, "copy" if begun else config.start, report, choice.kept)
    check_loads(model)
    cache = _cache(target, corpus, config, checkpoint, room)
    descent, plateau = _descent(target, model, choice.kept, corpus, config, group, cache), Plateau()
    descent = replace(descent, accumulate=plan_parts(descent, config.accumulate))
    group.begin(corpus, choice.kept, descent.accumulate)
    run_steps(
        _update(descent, config, plateau),
        Training(descent.student, plateau),
        steps=config.steps,
        seconds=config.minutes * 60 if config.minutes else None,
        stage="distil",
        report=report,
        checkpoint=kept,
        converged=plateau.reached if config.plateau else lambda: False,
    )
    group.end()
    if cache:
        cache.remove()
    model.model.requires_grad_(False)
    return model


def follow(
    target: LanguageModel,
    config: DistilConfig,
    group: Group,
    *,
    checkpoint: Path | None = None,
    room: CacheRoom | None = None,
) -> None:
    """Take part in the distillation that another process leads by :func:`distil`, until it is done."""
    corpus, kept, accumulate = group.begun(target, answers=bool(config.answer_forms))
    cache = _cache(target, corpus, config, checkpoint, room)
    descent = _descent(target, copy_student(target, kept), kept, corpus, config, group, cache)
    descent = replace(descent, accumulate=accumulate)
    while (step := group.called()) is not None:
        descent.gradients(step)


def _descent(
    target: LanguageModel,
    model: LanguageModel,
    kept: Sequence[int],
    corpus: Corpus,
    config: DistilConfig,
    group: Group,
    cache: TeacherCache | None,
) -> Descent:
    student = Student(
        model,
        learning_rate=config.learning_rate,
        freeze_head=config.freeze_head,
        freeze_embeddings=config.freeze_embeddings,
    )
    objective = Objective(target, model, config.temperature, kept=kept, alignment=config.alignment, cache=cache)
    return Descent(student, objective, corpus, group, config.rows, config.accumulate or 1, config.seed)


def _cache(
    target: LanguageModel, corpus: Corpus, config: DistilConfig, folder: Path | None, room: CacheRoom | None
) -> TeacherCache | None:
    """None where states would be of no use again: masked models read other tokens in each pass, alignment needs what
    is inside the target, and so many steps may end before a second pass."""
    once = config.steps is not None and config.steps * config.rows <= len(corpus.blocks)
    if folder is None or room is None or once or target.kind == "masked" or config.alignment:
        return None
    return TeacherCache(folder, corpus.digest, corpus.blocks.shape, target, room)


def _update(descent: Descent, config: DistilConfig, plateau: Plateau) -> Callable[[Clock], dict[str, float]]:
    """One step of distillation, as the training loop calls it; the loss also goes to ``plateau``."""
    began, tokens = time.monotonic(), 0

    def update(clock: Clock) -> dict[str, float]:
        nonlocal tokens
        descent.group.call(clock.step)
        values = descent.gradients(clock.step)
        descent.student.step(config.learning_rate * warm_then_linear(max(clock.done, 1e-3), WARM_UP))
        tokens += min(config.rows, len(descent.corpus.blocks)) * config.sequence_length
        plateau.add(values["loss"])
        return {**values, "tokens_per_second": tokens / (time.monotonic() - began)}

    return update


def _first_blocks(corpus: Corpus, config: DistilConfig, tokens: int) -> list[torch.Tensor]:
    """The first batches, up to so many tokens; at least one."""
    every = -(-len(corpus.blocks) // config.rows)
    count = min(every, max(1, tokens // (config.rows * config.sequence_length)))
    return [corpus.batch(step, config.rows, config.seed) for step in range(count)]


def _apart(corpus: Corpus, config: DistilConfig) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(batches that the starts of a search are fitted on, block rows that they are scored on), none in both as long as
    there are two blocks."""
    order = corpus.numbers(0, len(corpus.blocks), config.seed)
    most = max(config.rows, SEARCH_TOKENS // config.sequence_length)
    held = min(most, len(order) // 2) or 1
    fitted = order[: min(most, max(1, len(order) - held))]
    batches = [corpus.rows(fitted[at : at + config.rows]) for at in range(0, len(fitted), config.rows)]
    return batches, corpus.rows(order[-held:])


def _listed(config: DistilConfig) -> int | list[int]:
    return config.keep_layers if isinstance(config.keep_layers, int) else list(config.keep_layers)
