"""Transfer a prompt from the student to the target model with public text alone (method §3, Eq. 3-6).

Three of the four forward passes in the paper's loss are constant: Φs(p_s + x), Φs(x) and Φt(x). They are computed once,
without a graph. Each step is one forward and one backward pass of Φt: gradients for the prompt only, the LM head at the
answer positions only.
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
from post_shared.model.language_model import LanguageModel
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
"""Activations that a step may save for the backward pass, as a share of the target's size in float32: a transfer needs
at most half as much memory again as its target. Smaller micro-batches are slower. A GPU needs a whole batch to be
filled, so there only the free memory is a limit."""
Item = TypeVar("Item")
ALPHA_ROWS = 200
"""Public rows on which alpha='auto' is computed."""
LEARNING_RATES = {"instruction": 0.003, "source": 0.03}
"""Learning rate by initialisation of p_t: large steps would destroy an instruction's meaning."""


@dataclass(frozen=True)
class TransferResult:
    prompt: SoftPrompt
    alpha: float
    steps: int
    """Steps in all; the prompt is that of ``chosen_step``."""
    first_loss: float
    last_loss: float
    chosen_step: int
    held_out_loss: float | None
    """Mean loss on the held-out public rows at the chosen step; None with too few rows to hold out."""


def check_compatible(target: LanguageModel, student: LanguageModel, prompt: SoftPrompt) -> None:
    """Check that both models have the same vocabulary, which the losses need, and the prompt's width.

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


def paper_objective(target: LanguageModel, outputs: TeacherOutputs, alpha: float, temperature: float) -> Loss:
    """Eq. 3 over a batch as ``loss(prompt, batch) -> (P,)``. The constants are softened once."""
    log_student = soften(outputs.student, temperature)  # Φs(p_s + x), which Eq. 4 imitates
    log_student_shift = soften(outputs.student - outputs.student_plain, temperature)  # the change Eq. 5 reproduces

    def loss(prompt: Tensor, batch: Batch) -> Tensor:
        rows = outputs.rows_of(batch)
        logits = target.answer_logits(batch, prompt)  # (P, V)
        device = logits.device
        target_plain = outputs.target_plain[rows].to(device)  # Φt(x)
        imitation = imitation_loss(logits, log_student[rows].to(device), temperature)
        shift = shift_loss(logits, target_plain, log_student_shift[rows].to(device), temperature)
        return transfer_loss(imitation, shift, alpha)

    return loss


def ensemble_objective(target: LanguageModel, outputs: TeacherOutputs, alpha: float, words: LabelWords) -> Loss:
    """``loss(prompt, batch) -> (P,)``: KL of the target's class distribution from that of the ensemble.

    ``outputs`` holds class scores. Label words often have less than a thousandth of the vocabulary's probability, so
    they hardly count in Eq. 3; here nothing else counts.
    """
    log_ensemble = ensemble(outputs.student, outputs.target_plain, alpha)  # (N, C)

    def loss(prompt: Tensor, batch: Batch) -> Tensor:
        scores = words.scores(target.answer_logits(batch, prompt, tokens=words.token_ids))  # (P, C)
        return imitation_loss(scores, log_ensemble[outputs.rows_of(batch)].to(scores.device), temperature=1.0)

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
    """p_s -> p_t: train p_t by ``options.method`` on public texts, without labels.

    With method ``paper`` (Eq. 3), p_t is initialised from p_s. With ``ensemble``, it is initialised from an instruction
    (:func:`instruction_prompt`), which the target understands, unlike p_s. A generation task has no classes and always
    takes Eq. 3, at the first position of the answer.

    If there are enough public texts, some are held out, and the step with the lowest loss on them is chosen.
    A ``student`` given as a function is in memory only until its outputs are computed.

    With a ``group``, all its processes make the same call, with a target sharded by
    :func:`post_shared.training.fsdp.shard`; each gets the result, and the leader writes the checkpoint.

    Raises:
        PromptMismatch: prompt, student and target don't belong together.
        DataInvalid: there is no text.
        OutOfMemory: a step on a single text doesn't fit the free memory.
        Cancelled: raised by ``on_progress``; the state is saved first.
    """
    if options.alpha == "auto":
        raise InvalidInput("call choose_alpha() first: alpha='auto' needs public rows with labels")
    student_model = student if isinstance(student, LanguageModel) else student()
    check_compatible(target, student_model, prompt)
    sampled = sample_rows(list(dict.fromkeys(texts)), options.max_rows, options.seed)
    if not sampled:
        raise DataInvalid("the public dataset has no texts")
    encoded = encode_rows(target, task, sampled, options.max_length, reserved=prompt.length)
    words = _shared_label_words(target, student_model, task) if options.method == "ensemble" else None
    run_id = fingerprint(options, prompt.embeddings, sampled, task.spec().model_dump(), target, student_model)
    saved = Checkpoint(checkpoint, run_id, checkpoint_seconds, writes=group.leads) if checkpoint else None
    from_student = student_outputs(student_model, prompt, encoded, words, on_progress=on_progress)
    del student_model
    gc.collect()
    from_target = target_scores(target, encoded, words, task, on_progress=on_progress)
    outputs = TeacherOutputs(*from_student, from_target, encoded.whole)
    objective = _objective(target, outputs, words, options.alpha, options)
    initial, learning_rate = _initial_prompt(target, task, prompt, words, options)
    adam = _adam(target, initial, encoded, learning_rate, group)
    with target.using_graphs(target.new_graphs() if group.size == 1 else None):
        return _train(adam, objective, encoded, learning_rate, options, on_progress, saved)


def _shared_label_words(target: LanguageModel, student: LanguageModel, task: Task) -> LabelWords | None:
    """The tokens of the label words, the same for both models; None for a generation task."""
    if task.is_generation:
        return None
    words = label_words(target, task)
    if not torch.equal(words.token_ids, label_words(student, task).token_ids):
        raise PromptMismatch("student and target tokenise the task's label words into different tokens")
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
    """Train on the public rows that aren't held out, and choose the best step on those that are."""
    trained, held_out = hold_out(len(encoded), options.seed)
    best = BestStep(adam, objective, encoded.batch(held_out), batch_size=options.batch_size, steps=options.steps)
    losses: list[float] = []

    def record_loss(progress: Progress) -> None:
        losses.append(progress.metrics["loss"])
        on_progress(progress)

    train_prompt(
        best,
        objective,
        ShuffledBatches(encoded, options.batch_size, options.seed, rows=trained),
        steps=options.steps,
        learning_rate=learning_rate,
        stage="transfer",
        on_progress=record_loss,
        checkpoint=checkpoint,
        extra_metrics=lambda step: best.latest,
    )
    embeddings, step, held_out_loss = best.chosen
    first, last = float(best.first_loss), losses[-1] if losses else float("nan")
    return TransferResult(SoftPrompt(embeddings), float(options.alpha), options.steps, first, last, step, held_out_loss)


def sample_rows(rows: Sequence[Item], max_rows: int, seed: int = 0) -> list[Item]:
    """At most ``max_rows`` rows, drawn with the seed, in order. Not the first ones: a file may be sorted by label."""
    drawn = random.Random(f"public rows/{seed}").sample(range(len(rows)), min(max_rows, len(rows)))  # noqa: S311
    return [rows[index] for index in sorted(drawn)]


def instruction_prompt(target: LanguageModel, task: Task, length: int) -> SoftPrompt:
    """The embeddings of a text that states the task, from what the prompt file contains: its labels and template."""
    return SoftPrompt.from_text(target, template_words(task) if task.is_generation else instructions(task)[0], length)


def _initial_prompt(
    target: LanguageModel, task: Task, prompt: SoftPrompt, words: LabelWords | None, options: TransferOptions
) -> tuple[SoftPrompt, float]:
    """The initial p_t, and its learning rate."""
    name = options.prompt_init or ("instruction" if words else "source")
    initial = instruction_prompt(target, task, prompt.length) if name == "instruction" else prompt
    return initial, options.learning_rate or LEARNING_RATES[name]


def _objective(
    target: LanguageModel, outputs: TeacherOutputs, words: LabelWords | None, alpha: float, options: TransferOptions
) -> Loss:
    if words:
        return ensemble_objective(target, outputs, alpha, words)
    return paper_objective(target, outputs, alpha, options.temperature)


def max_activation_bytes(target: LanguageModel) -> int | None:
    """Bytes of activations that a step may save for the backward pass; None: only the free memory is a limit."""
    return None if target.device.type == "cuda" else int(STEP_SHARE * 4 * target.parameters)


def _adam(
    target: LanguageModel, prompt: SoftPrompt, encoded: EncodedRows, learning_rate: float, group: Group
) -> PromptAdam:
    """Adam on p_t, initialised as ``prompt``, in the micro-batches of the memory plan."""
    longest = prompt.length + encoded.whole.longest
    plan = plan_step(target, longest=longest, max_bytes=max_activation_bytes(target))
    parameter = nn.Parameter(prompt.embeddings.clone().to(target.device))
    packed = runs_prompt_once(target, longest)
    split = replace(plan, positions=group.min(plan.positions)).cut(prompt.length, packed=packed)
    if group.size > 1:
        return SharedAdam(parameter, learning_rate, split, group)
    return PromptAdam(parameter, learning_rate, split)


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
    """Eq. 6 with accuracies on public labelled rows: no private accuracy is needed.

    Raises:
        InvalidInput: a generation task, or rows whose labels aren't the task's.
    """
    if task.is_generation:
        raise InvalidInput("alpha='auto' needs a task with classes; give a number for a generation task")
    rows = sample_rows(rows, max_rows)
    try:
        check_labels(task, rows)
    except DataInvalid as error:
        raise InvalidInput(
            f"alpha='auto' needs public rows with the task's labels; give a number. {error.detail}"
        ) from error
    zero_shot = evaluate(target, task, rows, max_length=max_length).accuracy
    prompted_student = evaluate(student, task, rows, prompt.embeddings, max_length=max_length).accuracy
    return alpha_heuristic(zero_shot, prompted_student, 1.0 / len(task.labels))
