"""Distil a target model into a student: Φt -> Φs (method §1, Eq. 1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from post_server.ml.corpus import Corpus, Prediction, masked_tokens, next_token, prepare_corpus
from post_server.ml.start import STARTS, chosen_layers, copy_student
from post_shared.errors import InvalidInput
from post_shared.language_model import LanguageModel
from post_shared.losses import cosine_loss, distillation_loss, language_model_loss, softened_cross_entropy
from post_shared.schemas import DistillationCreate
from post_shared.training import (
    Checkpoint,
    Clock,
    Progress,
    Reporter,
    fingerprint,
    ignore,
    load_optimizer_state,
    optimizer_state,
    run_steps,
    set_learning_rate,
    warm_then_linear,
)

WARM_UP = 0.05
GRADIENT_NORM = 5.0
HEAD_SHARE = 0.25
"""Share of the positions at which the vocabulary losses are taken; the cosine is taken at all of them."""


@dataclass(frozen=True)
class DistilConfig:
    """How to distil; the defaults are those of :class:`post_shared.schemas.DistillationCreate`."""

    keep_layers: tuple[int, ...] | int = 8
    start: str = "fold"
    answer_forms: tuple[str, ...] = ()
    freeze_head: bool = True
    freeze_embeddings: bool = True
    steps: int | None = None
    minutes: float | None = None
    plateau: bool = False
    learning_rate: float = 1e-3
    batch_tokens: int = 512
    sequence_length: int = 64
    start_tokens: int = 15_000
    temperature: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise InvalidInput(f"there is no start {self.start!r}; there are: {', '.join(STARTS)}")
        if self.steps is None and self.minutes is None:
            raise InvalidInput("say how long to distil: steps, minutes or both")
        if self.sequence_length > self.batch_tokens:
            raise InvalidInput("batch_tokens holds at least one sequence")

    @property
    def rows(self) -> int:
        """Sequences in a batch."""
        return self.batch_tokens // self.sequence_length

    @classmethod
    def from_request(cls, request: DistillationCreate) -> DistilConfig:
        keep = request.keep_layers
        names = ("start", "freeze_head", "freeze_embeddings", "steps", "minutes", "plateau", "learning_rate")
        more = ("batch_tokens", "sequence_length", "seed")
        return cls(
            keep_layers=keep if isinstance(keep, int) else tuple(keep),
            answer_forms=tuple(request.answer_forms),
            **{name: getattr(request, name) for name in (*names, *more)},
        )


class Student:
    """The student's trained weights with their AdamW, as the training loop sees them."""

    def __init__(self, model: LanguageModel, config: DistilConfig) -> None:
        self.model = model
        head, embeddings = model.model.get_output_embeddings(), model.model.get_input_embeddings()
        frozen: set[nn.Parameter] = set()
        frozen |= set(head.parameters()) if config.freeze_head and head is not None else set()
        frozen |= set(embeddings.parameters()) if config.freeze_embeddings else set()  # one and the same when tied
        self.weights = {name: p for name, p in model.model.named_parameters() if p not in frozen}
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(list(self.weights.values()), lr=config.learning_rate)

    def step(self, loss: Tensor, learning_rate: float) -> None:
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(list(self.weights.values()), GRADIENT_NORM)
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        weights = {f"weight.{name}": weight.detach() for name, weight in self.weights.items()}
        return weights | optimizer_state(self.optimizer)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"weight.{name}"])
        load_optimizer_state(self.optimizer, tensors)


@dataclass
class Plateau:
    """True once the loss, smoothed over ``window`` steps, no longer falls by ``share`` from one window to the next."""

    window: int = 200
    share: float = 0.002

    def __post_init__(self) -> None:
        self._seen: list[float] = []

    def add(self, loss: float) -> None:
        self._seen.append(loss)

    def reached(self) -> bool:
        if len(self._seen) < 2 * self.window or len(self._seen) % self.window:
            return False
        before, now = self._seen[-2 * self.window : -self.window], self._seen[-self.window :]
        return sum(now) > (1.0 - self.share) * sum(before)


def start_student(
    target: LanguageModel, corpus: Corpus, config: DistilConfig, start: str, report: Reporter = ignore
) -> LanguageModel:
    """The student before distillation: layers chosen, copied, and prepared by the start of that name."""
    keep = config.keep_layers if isinstance(config.keep_layers, int) else list(config.keep_layers)
    kept = chosen_layers(keep, target.layers)
    student = copy_student(target, kept)
    every = -(-len(corpus.blocks) // config.rows)
    count = min(every, max(1, config.start_tokens // (config.rows * config.sequence_length)))
    STARTS[start](
        target, student, kept, [corpus.batch(step, config.rows, config.seed) for step in range(count)], report
    )
    return student


def distil(
    target: LanguageModel,
    paragraphs: Sequence[str],
    config: DistilConfig,
    *,
    report: Reporter = ignore,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> LanguageModel:
    """Train a student of ``target`` on public text by Eq. 1; returns it frozen.

    Raises:
        InvalidInput: layers, start or length that don't fit the model.
        DataInvalid: too little text.
        Cancelled: raised by ``report``; the state is kept first.
    """
    report(Progress(0, 1, "corpus"))
    corpus = prepare_corpus(
        target, paragraphs, config.sequence_length, checkpoint, answer_forms=config.answer_forms, seed=config.seed
    )
    work = fingerprint(config, corpus.digest, target.model)
    kept = Checkpoint(checkpoint, work, checkpoint_seconds) if checkpoint else None
    begun = kept is not None and kept.begun()  # its weights replace whatever the student would start from
    model = start_student(target, corpus, config, "copy" if begun else config.start, report)
    student, plateau = Student(model, config), Plateau()
    run_steps(
        _update(target, student, corpus, config, plateau),
        student,
        steps=config.steps,
        seconds=config.minutes * 60 if config.minutes else None,
        stage="distil",
        report=report,
        checkpoint=kept,
        converged=plateau.reached if config.plateau else lambda: False,
    )
    model.model.requires_grad_(False)
    return model


def _update(
    target: LanguageModel, student: Student, corpus: Corpus, config: DistilConfig, plateau: Plateau
) -> Callable[[Clock], dict[str, float]]:
    """One step of distillation, as the training loop calls it; the loss also goes to ``plateau``."""
    began, tokens = time.monotonic(), 0
    place = target.device.type

    def update(clock: Clock) -> dict[str, float]:
        nonlocal tokens
        prediction = _prediction(target, corpus, clock.step, config.rows, config.seed)
        with torch.autocast(place, torch.bfloat16, enabled=place == "cuda"):
            losses = distillation_losses(target, student.model, prediction, config.temperature)
        loss = distillation_loss(losses["ce"], losses["lm"], losses["cos"])
        student.step(loss, config.learning_rate * warm_then_linear(max(clock.done, 1e-3), WARM_UP))
        tokens += prediction.inputs.numel()
        values = {name: float(value.detach()) for name, value in {"loss": loss, **losses}.items()}
        plateau.add(values["loss"])
        return {**values, "tokens_per_second": tokens / (time.monotonic() - began)}

    return update


def distillation_losses(
    target: LanguageModel, student: LanguageModel, prediction: Prediction, temperature: float
) -> dict[str, Tensor]:
    """The three terms of Eq. 1 on one batch, each a mean: {"ce", "lm", "cos"}."""
    rows, positions = prediction.rows.to(target.device), prediction.positions.to(target.device)
    with torch.no_grad():
        right = target.hidden(prediction.inputs)  # (B, T, d)
        teacher = target.head(right[rows, positions])  # (n, V)
    hidden = student.hidden(prediction.inputs)  # (B, T, d)
    logits = student.head(hidden[rows, positions])  # (n, V)
    return {
        "ce": softened_cross_entropy(teacher, logits, temperature).mean(),
        "lm": language_model_loss(logits, prediction.tokens.to(target.device)).mean(),
        "cos": cosine_loss(right, hidden).mean(),
    }


def _prediction(target: LanguageModel, corpus: Corpus, step: int, rows: int, seed: int) -> Prediction:
    block = corpus.batch(step, rows, seed)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    if target.kind == "masked":
        mask = int(target.tokenizer.mask_token_id)
        return masked_tokens(block, mask, target.vocabulary, corpus.counts, generator)
    return next_token(block, HEAD_SHARE, generator, answer_end=corpus.end if corpus.answers else None)
