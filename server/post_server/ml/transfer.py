"""Move a prompt from the student to the target model with public text alone (method §3, Eq. 3-6).

Three of the four forward passes in the paper's loss never change: Φs(p_s + x), Φs(x) and Φt(x). They are
computed once, without a graph; each step is one forward and one backward pass of Φt, to the prompt only,
with the head at the answer positions only.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from post_server.ml.asking import opinion, wordings
from post_server.ml.constants import Constants, student_answers
from post_server.ml.ensemble import ensemble
from post_server.ml.held_out import BestStep, hold_out
from post_server.ml.processes import ALONE, Group
from post_server.ml.sharded import SharedAdam
from post_shared.batches import Batch, EncodedRows, ShuffledBatches, encode_rows
from post_shared.data import Row
from post_shared.errors import DataInvalid, InvalidInput, PromptMismatch
from post_shared.evaluation import check_labels, evaluate
from post_shared.label_words import LabelWords, label_words
from post_shared.language_model import LanguageModel
from post_shared.losses import alpha_heuristic, divergence, soften, transfer_loss
from post_shared.memory import plan_step, runs_prompt_once
from post_shared.prompt_tuning import template_words
from post_shared.replays import recorder_of, replays
from post_shared.schemas import TransferCreate
from post_shared.soft_prompt import SoftPrompt
from post_shared.tasks import Task
from post_shared.training import Checkpoint, Loss, Progress, PromptAdam, Reporter, fingerprint, ignore, train_prompt

STEP_SHARE = 0.19
"""Of the target's size in float32: what a step keeps for the way back, so that a transfer takes at most half as much
again as its target. Less would cost more time: small matrices are slow. A GPU is filled by no less than a batch, and
has memory of its own: there only what is free is a limit."""
Item = TypeVar("Item")
ALPHA_ROWS = 200
"""Public rows on which alpha='auto' is found."""
RATES = {"task": 0.003, "source": 0.03}
"""Learning rate by where p_t starts: what words that state the task already say is lost in large steps."""


@dataclass(frozen=True)
class TransferConfig:
    """How to transfer. Defaults are those of the API document; see :class:`post_shared.schemas.TransferCreate`."""

    alpha: float = 0.7
    method: Literal["ensemble", "paper"] = "ensemble"
    start: Literal["task", "source"] | None = None
    steps: int = 250
    batch_size: int = 16
    learning_rate: float | None = None
    """None: that of :data:`RATES`."""
    temperature: float = 2.0
    max_rows: int = 512
    max_length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise InvalidInput(f"alpha weighs Eq. 5 against Eq. 4 and lies in 0..1, not {self.alpha}")
        if min(self.steps, self.batch_size, self.max_rows, self.max_length) < 1:
            raise InvalidInput("steps, batch size, rows and length are at least 1")
        rates = (self.learning_rate, self.temperature)
        if any(each is not None and not (isfinite(each) and each > 0) for each in rates):
            raise InvalidInput("learning rate and temperature are finite numbers above 0")

    @classmethod
    def from_request(cls, request: TransferCreate, alpha: float) -> TransferConfig:
        names = ("method", "start", "steps", "batch_size", "learning_rate", "temperature", "seed")
        more = ("max_rows", "max_length")
        return cls(alpha=alpha, **{name: getattr(request, name) for name in (*names, *more)})


@dataclass(frozen=True)
class TransferResult:
    prompt: SoftPrompt
    alpha: float
    steps: int
    """Steps made; the prompt is that of ``chosen_step``."""
    first_loss: float
    last_loss: float
    chosen_step: int
    held_out_loss: float | None
    """Mean loss at the chosen step on public rows that weren't trained on; None if there were too few to leave out."""


def check_pair(target: LanguageModel, student: LanguageModel, prompt: SoftPrompt) -> None:
    """The full-vocabulary losses need the same vocabulary, and the prompt the same width, on both sides.

    Raises:
        PromptMismatch: they differ.
    """
    if prompt.width != student.hidden_size:
        raise PromptMismatch(f"the prompt has width {prompt.width}, the student {student.hidden_size}")
    if student.hidden_size != target.hidden_size or student.vocabulary != target.vocabulary:
        raise PromptMismatch(
            f"the student (width {student.hidden_size}, vocabulary {student.vocabulary}) isn't one of the target model "
            f"(width {target.hidden_size}, vocabulary {target.vocabulary}); use the target that it was distilled from"
        )


def paper_objective(target: LanguageModel, known: Constants, alpha: float, temperature: float) -> Loss:
    """Eq. 3 over a batch as ``loss(prompt, batch) -> (P,)``, with all that is constant already softened."""
    imitated = soften(known.student, temperature)  # what Eq. 4 imitates
    shifts = soften(known.student - known.student_plain, temperature)  # the change that Eq. 5 reproduces

    def loss(prompt: Tensor, batch: Batch) -> Tensor:
        at = known.of(batch)
        logits = target.answer_logits_shared(batch, prompt)  # (P, V)
        place = logits.device
        moved = logits - known.target_plain[at].to(place)
        imitation = divergence(imitated[at].to(place), soften(logits, temperature))
        return transfer_loss(imitation, divergence(shifts[at].to(place), soften(moved, temperature)), alpha)

    return loss


def ensemble_objective(target: LanguageModel, known: Constants, alpha: float, words: LabelWords) -> Loss:
    """``loss(prompt, batch) -> (P,)``: KL of the target's classes from what it and the student say together.

    ``known`` holds class scores. Of the vocabulary's probability, label words often hold less than a thousandth, so
    that Eq. 3 hardly sees them; here nothing else counts.
    """
    goal = ensemble(known.student, known.target_plain, alpha)  # (N, C)

    def loss(prompt: Tensor, batch: Batch) -> Tensor:
        scores = words.scores(target.answer_logits_shared(batch, prompt, tokens=words.token_ids))  # (P, C)
        return divergence(goal[known.of(batch)].to(scores.device), soften(scores, 1.0))

    return loss


def transfer(
    target: LanguageModel,
    student: LanguageModel | Callable[[], LanguageModel],
    task: Task,
    prompt: SoftPrompt,
    texts: Sequence[str],
    config: TransferConfig,
    *,
    report: Reporter = ignore,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    group: Group = ALONE,
) -> TransferResult:
    """p_s -> p_t: follow the method's loss on public texts. Labels are never looked at.

    The ensemble starts from words that state the task (:func:`stated`), where the target reads as it does without a
    prompt; Eq. 3 starts where p_s is, which means little to the target.

    Of enough public texts some are left out of training, and the step at which these are imitated best is chosen.
    A ``student`` that is loaded by calling it is in memory only until it has answered.

    With a ``group``, all its processes call this alike, with a target that :func:`post_server.ml.sharded.shard` shared
    out to them; each gets the result, and the one that leads keeps the checkpoint.

    A generation task has no classes: it is transferred by the paper's loss, where the answer begins.

    Raises:
        PromptMismatch: prompt, student and target don't belong together.
        DataInvalid: there is no text.
        OutOfMemory: a step on a single text doesn't fit the free memory.
    """
    small = student if isinstance(student, LanguageModel) else student()
    check_pair(target, small, prompt)
    chosen = some_of(list(dict.fromkeys(texts)), config.max_rows, config.seed)
    if not chosen:
        raise DataInvalid("the public dataset has no texts")
    encoded = encode_rows(target, task, chosen, config.max_length, room=prompt.length)
    words = label_words(target, task) if config.method == "ensemble" and not task.is_generation else None
    if words and not torch.equal(words.token_ids, label_words(small, task).token_ids):
        raise PromptMismatch("student and target cut the task's label words into different tokens")
    work = fingerprint(config, prompt.embeddings, chosen, task.form().model_dump(), target.model, small.model)
    said = student_answers(small, prompt, encoded, words, report=report)
    del small
    gc.collect()
    known = Constants(*said, opinion(target, encoded, words, task, report=report), encoded.whole)
    objective = _objective(target, known, words, config)
    losses: list[float] = []

    def watch(progress: Progress) -> None:
        losses.append(progress.metrics["loss"])
        report(progress)

    start, rate = _start(target, task, prompt, words, config)
    adam = _adam(target, start, encoded, rate, group)
    trained, left_out = hold_out(len(encoded), config.seed)
    best = BestStep(adam, objective, encoded.batch(left_out), batch_size=config.batch_size, steps=config.steps)
    with replays(target, recorder_of(target) if group.size == 1 else None):
        train_prompt(
            best,
            objective,
            ShuffledBatches(encoded, config.batch_size, config.seed, rows=trained),
            steps=config.steps,
            learning_rate=rate,
            stage="transfer",
            report=watch,
            checkpoint=Checkpoint(checkpoint, work, checkpoint_seconds, writes=group.leads) if checkpoint else None,
            also=lambda step: best.latest,
        )
    moved, step, held_out_loss = best.chosen
    first, last = float(best.first), losses[-1] if losses else float("nan")
    return TransferResult(SoftPrompt(moved), config.alpha, config.steps, first, last, step, held_out_loss)


def some_of(every: Sequence[Item], most: int, seed: int = 0) -> list[Item]:
    """Drawn by the seed, in their order: a file may be sorted by its labels."""
    drawn = random.Random(f"public rows/{seed}").sample(range(len(every)), min(most, len(every)))  # noqa: S311
    return [every[at] for at in sorted(drawn)]


def stated(target: LanguageModel, task: Task, length: int) -> SoftPrompt:
    """The embeddings of words that state the task, as far as an owner says it: its labels and its template."""
    return SoftPrompt.from_text(target, template_words(task) if task.is_generation else wordings(task)[0], length)


def _start(
    target: LanguageModel, task: Task, prompt: SoftPrompt, words: LabelWords | None, config: TransferConfig
) -> tuple[SoftPrompt, float]:
    """Where p_t begins, and the learning rate that suits it."""
    name = config.start or ("task" if words else "source")
    start = stated(target, task, prompt.length) if name == "task" else prompt
    return start, config.learning_rate or RATES[name]


def _objective(target: LanguageModel, known: Constants, words: LabelWords | None, config: TransferConfig) -> Loss:
    if words:
        return ensemble_objective(target, known, config.alpha, words)
    return paper_objective(target, known, config.alpha, config.temperature)


def most_kept(target: LanguageModel) -> int | None:
    """Bytes that a step may keep for the way back; None: what is free is the limit."""
    return None if target.device.type == "cuda" else int(STEP_SHARE * 4 * target.parameters)


def _adam(
    target: LanguageModel, prompt: SoftPrompt, encoded: EncodedRows, learning_rate: float, group: Group
) -> PromptAdam:
    """On p_t, which starts as ``prompt``, in micro-batches that the memory plan allows."""
    longest = prompt.length + encoded.whole.longest
    plan = plan_step(target, longest=longest, most=most_kept(target))
    start = nn.Parameter(prompt.embeddings.clone().to(target.device))
    packed = runs_prompt_once(target, longest)
    cut = replace(plan, positions=group.least(plan.positions)).cut(prompt.length, packed=packed)
    if group.size > 1:
        return SharedAdam(start, learning_rate, cut, group)
    return PromptAdam(start, learning_rate, cut)


def choose_alpha(
    target: LanguageModel,
    student: LanguageModel,
    task: Task,
    prompt: SoftPrompt,
    rows: Sequence[Row],
    *,
    max_rows: int = ALPHA_ROWS,
    max_length: int = 128,
) -> float:
    """Eq. 6 on public labelled rows: no private figure is needed.

    Raises:
        InvalidInput: a generation task, or rows whose labels aren't the task's.
    """
    if task.is_generation:
        raise InvalidInput("alpha='auto' needs classes to guess among; give a number for a generation task")
    rows = some_of(rows, max_rows)
    try:
        check_labels(task, rows)
    except DataInvalid as error:
        raise InvalidInput(
            f"alpha='auto' needs public rows with the task's labels; give a number. {error.detail}"
        ) from error
    zero_shot = evaluate(target, task, rows, max_length=max_length).accuracy
    compressed = evaluate(student, task, rows, prompt.embeddings, max_length=max_length).accuracy
    return alpha_heuristic(zero_shot, compressed, 1.0 / len(task.labels))
