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
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from post_shared.data.batches import Batch, EncodedRows, ShuffledBatches
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import DataInvalid, InvalidInput, PromptMismatch
from post_shared.inference.evaluation import check_labels, evaluate
from post_shared.method.losses import alpha_heuristic, imitation_loss, shift_loss, soften, transfer_loss
from post_shared.method.transfer.ensemble import ensemble
from post_shared.method.transfer.prompt_ensemble import instructions, target_scores
from post_shared.method.transfer.teacher_outputs import TeacherOutputs, student_outputs
from post_shared.method.transfer.validation import BestStep, hold_out
from post_shared.method.tuning.tune import template_words
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel, Prompt
from post_shared.model.memory_plan import plan_step, runs_prompt_once
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import LabelWords, label_words
from post_shared.schemas.transfers import TransferOptions
from post_shared.training.checkpoint import Checkpoint, fingerprint
from post_shared.training.distributed import ALONE, Group
from post_shared.training.fsdp import SharedAdam
from post_shared.training.loop import train_prompt
from post_shared.training.optimizer import Loss, PromptAdam
from post_shared.training.progress import Progress, ProgressCallback, ignore

STEP_SHARE = 0.19
"""Of the target's size in float32: what a step keeps for the way back, so that a transfer takes at most half as much
again as its target. Less would cost more time: small matrices are slow. A GPU is filled by no less than a batch, and
has memory of its own: there only what is free is a limit."""
Item = TypeVar("Item")
ALPHA_ROWS = 200
"""Public rows on which alpha='auto' is found."""
LEARNING_RATES = {"instruction": 0.003, "source": 0.03}
"""Learning rate by where p_t starts: what words that state the task already say is lost in large steps."""


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


def paper_objective(target: LanguageModel, known: TeacherOutputs, alpha: float, temperature: float) -> Loss:
    """Eq. 3 over a batch as ``loss(prompt, batch) -> (P,)``. What is constant is softened once."""
    student = soften(known.student, temperature)  # Φs(p_s + x), which Eq. 4 imitates
    student_shift = soften(known.student - known.student_plain, temperature)  # the change that Eq. 5 reproduces

    def loss(prompt: Prompt, batch: Batch) -> Tensor:
        at = known.of(batch)
        logits = target.answer_logits(batch, prompt)  # (P, V)
        place = logits.device
        imitation = imitation_loss(logits, student[at].to(place), temperature)
        shift = shift_loss(logits, known.target_plain[at].to(place), student_shift[at].to(place), temperature)
        return transfer_loss(imitation, shift, alpha)

    return loss


def ensemble_objective(target: LanguageModel, known: TeacherOutputs, alpha: float, words: LabelWords) -> Loss:
    """``loss(prompt, batch) -> (P,)``: KL of the target's classes from what it and the student say together.

    ``known`` holds class scores. Label words often hold less than a thousandth of the vocabulary's probability, so
    Eq. 3 hardly sees them; here nothing else counts.
    """
    goal = ensemble(known.student, known.target_plain, alpha)  # (N, C) log-probabilities

    def loss(prompt: Prompt, batch: Batch) -> Tensor:
        scores = words.scores(target.answer_logits(batch, prompt, tokens=words.token_ids))  # (P, C)
        return imitation_loss(scores, goal[known.of(batch)].to(scores.device), temperature=1.0)

    return loss


def transfer(
    target: LanguageModel,
    student: LanguageModel | Callable[[], LanguageModel],
    task: Task,
    prompt: SoftPrompt,
    texts: Sequence[str],
    options: TransferOptions,
    *,
    on_progress: ProgressCallback = ignore,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    group: Group = ALONE,
) -> TransferResult:
    """p_s -> p_t: follow the method's loss on public texts. Labels are never looked at.

    The ensemble starts from words that state the task (:func:`instruction_prompt`), where the target reads as it does without a
    prompt; Eq. 3 starts where p_s is, which means little to the target.

    Of enough public texts some are left out of training, and the step at which these are imitated best is chosen.
    A ``student`` that is loaded by calling it is in memory only until it has answered.

    With a ``group``, all its processes call this alike, with a target that :func:`post_shared.training.fsdp.shard` shared
    out to them; each gets the result, and the one that leads keeps the checkpoint.

    A generation task has no classes: it is transferred by the paper's loss, where the answer begins.

    Raises:
        PromptMismatch: prompt, student and target don't belong together.
        DataInvalid: there is no text.
        OutOfMemory: a step on a single text doesn't fit the free memory.
    """
    if options.alpha == "auto":
        raise InvalidInput("find alpha by choose_alpha() first: it needs public rows with labels")
    small = student if isinstance(student, LanguageModel) else student()
    check_pair(target, small, prompt)
    chosen = some_of(list(dict.fromkeys(texts)), options.max_rows, options.seed)
    if not chosen:
        raise DataInvalid("the public dataset has no texts")
    encoded = encode_rows(target, task, chosen, options.max_length, reserved=prompt.length)
    words = _shared_label_words(target, small, task) if options.method == "ensemble" else None
    run_id = fingerprint(options, prompt.embeddings, chosen, task.spec().model_dump(), target, small)
    kept = Checkpoint(checkpoint, run_id, checkpoint_seconds, writes=group.leads) if checkpoint else None
    outputs = student_outputs(small, prompt, encoded, words, on_progress=on_progress)
    del small
    gc.collect()
    own = target_scores(target, encoded, words, task, on_progress=on_progress)
    objective = _objective(target, TeacherOutputs(*outputs, own, encoded.whole), words, options.alpha, options)
    start, rate = _start(target, task, prompt, words, options)
    adam = _adam(target, start, encoded, rate, group)
    with target.replaying(target.new_graphs() if group.size == 1 else None):
        return _train(adam, objective, encoded, rate, options, on_progress, kept)


def _shared_label_words(target: LanguageModel, student: LanguageModel, task: Task) -> LabelWords | None:
    """The tokens of the label words, the same for both models; None for a generation task."""
    if task.is_generation:
        return None
    words = label_words(target, task)
    if not torch.equal(words.token_ids, label_words(student, task).token_ids):
        raise PromptMismatch("student and target cut the task's label words into different tokens")
    return words


def _train(
    adam: PromptAdam,
    objective: Loss,
    encoded: EncodedRows,
    learning_rate: float,
    options: TransferOptions,
    on_progress: ProgressCallback,
    checkpoint: Checkpoint | None,
) -> TransferResult:
    """Train on most of the public rows; the rest, if there are enough, choose the step."""
    trained, left_out = hold_out(len(encoded), options.seed)
    best = BestStep(adam, objective, encoded.batch(left_out), batch_size=options.batch_size, steps=options.steps)
    losses: list[float] = []

    def watch(progress: Progress) -> None:
        losses.append(progress.metrics["loss"])
        on_progress(progress)

    train_prompt(
        best,
        objective,
        ShuffledBatches(encoded, options.batch_size, options.seed, rows=trained),
        steps=options.steps,
        learning_rate=learning_rate,
        stage="transfer",
        on_progress=watch,
        checkpoint=checkpoint,
        also=lambda step: best.latest,
    )
    moved, step, held_out_loss = best.chosen
    first, last = float(best.first), losses[-1] if losses else float("nan")
    return TransferResult(SoftPrompt(moved), float(options.alpha), options.steps, first, last, step, held_out_loss)


def some_of(every: Sequence[Item], most: int, seed: int = 0) -> list[Item]:
    """Drawn by the seed, in their order: a file may be sorted by its labels."""
    drawn = random.Random(f"public rows/{seed}").sample(range(len(every)), min(most, len(every)))  # noqa: S311
    return [every[at] for at in sorted(drawn)]


def instruction_prompt(target: LanguageModel, task: Task, length: int) -> SoftPrompt:
    """The embeddings of words that state the task, as far as an owner says it: its labels and its template."""
    return SoftPrompt.from_text(target, template_words(task) if task.is_generation else instructions(task)[0], length)


def _start(
    target: LanguageModel, task: Task, prompt: SoftPrompt, words: LabelWords | None, options: TransferOptions
) -> tuple[SoftPrompt, float]:
    """Where p_t begins, and the learning rate that suits it."""
    name = options.prompt_init or ("instruction" if words else "source")
    start = instruction_prompt(target, task, prompt.length) if name == "instruction" else prompt
    return start, options.learning_rate or LEARNING_RATES[name]


def _objective(
    target: LanguageModel, known: TeacherOutputs, words: LabelWords | None, alpha: float, options: TransferOptions
) -> Loss:
    if words:
        return ensemble_objective(target, known, alpha, words)
    return paper_objective(target, known, alpha, options.temperature)


def max_kept_bytes(target: LanguageModel) -> int | None:
    """Bytes that a step may keep for the way back; None: what is free is the limit."""
    return None if target.device.type == "cuda" else int(STEP_SHARE * 4 * target.parameters)


def _adam(
    target: LanguageModel, prompt: SoftPrompt, encoded: EncodedRows, learning_rate: float, group: Group
) -> PromptAdam:
    """On p_t, which starts as ``prompt``, in micro-batches that the memory plan allows."""
    longest = prompt.length + encoded.whole.longest
    plan = plan_step(target, longest=longest, most=max_kept_bytes(target))
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
    prompted_student = evaluate(student, task, rows, prompt.embeddings, max_length=max_length).accuracy
    return alpha_heuristic(zero_shot, prompted_student, 1.0 / len(task.labels))
