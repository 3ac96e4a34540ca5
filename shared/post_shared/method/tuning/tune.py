"""Tuning a soft prompt on labelled rows (method §2): by the data owner on private rows, or by the provider on public
ones, to measure what a student can learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from post_shared.data.batches import Batch, EncodedRows
from post_shared.data.rows import Row
from post_shared.data.tasks import MASK, TEXT, Task
from post_shared.errors import DataInvalid
from post_shared.inference.evaluation import check_labels
from post_shared.method.losses import answer_loss, label_word_loss
from post_shared.method.tuning.label_bias import MIN_TEXTS, CalibratedLoss
from post_shared.model.language_model import LanguageModel
from post_shared.model.memory_plan import plan_step, runs_prompt_once
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.model.verbalizer import label_words
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.averaging import Averaged
from post_shared.training.checkpoint import Checkpoint
from post_shared.training.loop import train_prompt
from post_shared.training.optimizer import Loss, PromptOptimizer, Split
from post_shared.training.progress import ProgressCallback, ignore

PUBLIC_BATCH = 32
"""Public texts on which the label bias is measured in each step of a private run."""
PLAIN_BATCH = 16
"""The same in a run without privacy: an error from few texts is corrected by the next steps."""


def tuning_objective(model: LanguageModel, task: Task) -> Loss:
    """``loss(prompt, batch) -> (B,)``: cross-entropy of the label-word scores, or over the answer's tokens."""
    if task.is_generation:

        def generation(prompt: Tensor, batch: Batch) -> Tensor:
            logits = model.answer_logits(batch, prompt)  # (P, V)
            device = logits.device
            return answer_loss(logits, batch.tokens.to(device), batch.rows.to(device), len(batch))

        return generation
    words = label_words(model, task)

    def classification(prompt: Tensor, batch: Batch) -> Tensor:
        scores = words.scores(model.answer_logits(batch, prompt, tokens=words.token_ids))  # (B, C)
        return label_word_loss(scores, batch.labels.to(scores.device))

    return classification


def starting_prompt(model: LanguageModel, task: Task, options: TuneOptions) -> SoftPrompt:
    """The prompt before tuning: random, or the embeddings of the task's description or, without one, its template."""
    if options.prompt_init == "random":
        return SoftPrompt.random(model, options.num_virtual_tokens, options.seed)
    return SoftPrompt.from_text(model, task.description or template_words(task), options.num_virtual_tokens)


def template_words(task: Task) -> str:
    """The template's words around the text."""
    return task.template.replace(TEXT, " ").replace(MASK, " ").strip() or "Answer:"


def check_rows(task: Task, rows: Sequence[Row]) -> None:
    """Raise :class:`DataInvalid` for rows that can't be tuned on: none, unlabelled, unknown labels, or one class."""
    if not rows:
        raise DataInvalid("there are no rows to tune on")
    unlabelled = sum(row.label is None for row in rows)
    if unlabelled:
        raise DataInvalid(f"{unlabelled} of {len(rows)} rows have no label; tuning needs a label for each")
    if not task.is_generation:
        check_labels(task, rows)
        counts = Counter(row.label for row in rows)
        if len(counts) < 2:
            subject = "the only row has" if len(rows) == 1 else f"all {len(rows)} rows have"
            raise DataInvalid(f"{subject} the label {next(iter(counts))!r}; tuning needs at least two classes")


def train_on_task(
    model: LanguageModel,
    task: Task,
    optimizer: PromptOptimizer,
    batches: Callable[[int], Batch],
    options: TuneOptions,
    *,
    steps: int,
    calibrated: CalibratedLoss | None = None,
    on_progress: ProgressCallback = ignore,
    checkpoint: Checkpoint | None = None,
    also: Callable[[int], Mapping[str, float]] = lambda step: {},
) -> SoftPrompt:
    """Train the optimizer's prompt for ``task`` on the frozen ``model``; with ``calibrated`` from
    :func:`calibrated_loss`, by that loss.

    Raises:
        Cancelled: raised by ``on_progress``; the state is saved first.
    """
    objective = tuning_objective(model, task) if calibrated is None else calibrated

    def batch(step: int) -> Batch:
        if calibrated is not None:  # the bias depends on the prompt: measured before each step
            calibrated.measure(step, optimizer.prompt)
        return batches(step)

    averaged = Averaged(optimizer, since=steps // 2) if options.average_iterates else None
    with model.using_graphs(model.new_graphs()):
        tuned = train_prompt(
            averaged or optimizer,
            objective,
            batch,
            steps=steps,
            learning_rate=options.learning_rate,
            stage="tune",
            on_progress=on_progress,
            checkpoint=checkpoint,
            extra_metrics=also,
        )
    return SoftPrompt(averaged.average if averaged else tuned)


def calibrated_loss(
    model: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    public: Sequence[str] | None,
    options: TuneOptions,
    *,
    private: bool,
    per_row: bool | None = None,
) -> CalibratedLoss | None:
    """The loss calibrated for the label bias on ``public`` texts.

    Without these, a run that isn't ``private`` uses the rows' own texts; None if they are too few or for a generation
    task. ``per_row`` as in :class:`post_shared.method.tuning.label_bias.CalibratedLoss`; by default as ``private``.

    Raises:
        DataInvalid, InvalidInput: as :class:`post_shared.method.tuning.label_bias.CalibratedLoss`.
    """
    texts = public if public is not None or private else _own_texts(task, rows)
    if texts is None:
        return None
    return CalibratedLoss(
        model,
        task,
        texts,
        batch_size=PUBLIC_BATCH if private else PLAIN_BATCH,
        max_length=options.max_length,
        reserved=options.num_virtual_tokens,
        per_row=private if per_row is None else per_row,
    )


def plan_tuning(
    model: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    public: Sequence[str] | None,
    encoded: EncodedRows,
    options: TuneOptions,
    *,
    private: bool,
) -> tuple[Split, CalibratedLoss | None]:
    """How a plain step on ``encoded`` is split to fit the free memory, and the calibrated loss, if any.

    In a plain step the activations of the bias's texts stay in memory, so the rows get what these leave. Nothing in a
    private run may depend on the free memory, nor its start on the length of a row: its micro-batches are fixed, and
    the check assumes the longest possible row.

    Raises:
        OutOfMemory: a step on a single row, with the bias's texts, doesn't fit.
        DataInvalid, InvalidInput: as :class:`post_shared.method.tuning.label_bias.CalibratedLoss`.
    """
    calibrated = calibrated_loss(model, task, rows, public, options, private=private)
    held, longest = (
        calibrated.held if calibrated else 0,
        options.num_virtual_tokens + (options.max_length if private else encoded.whole.longest),
    )
    plan = plan_step(model, longest=longest + held)
    remaining = replace(plan, positions=plan.positions - held)
    return remaining.cut(options.num_virtual_tokens, packed=runs_prompt_once(model, longest)), calibrated


def _own_texts(task: Task, rows: Sequence[Row]) -> list[str] | None:
    texts = list(dict.fromkeys(row.text for row in rows))
    return None if task.is_generation or len(texts) < MIN_TEXTS else texts
