"""Tuning a soft prompt on labelled rows, whoever does it: the data owner on private ones (method §2), the provider on
public ones to see what a student can learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from torch import Tensor

from post_shared.averaging import Averaged
from post_shared.batches import Batch, EncodedRows
from post_shared.data import Row
from post_shared.errors import DataInvalid, InvalidInput
from post_shared.evaluation import check_labels
from post_shared.label_words import label_words
from post_shared.language_model import LanguageModel
from post_shared.lean import LEAST_TEXTS, LeanFreeLoss
from post_shared.losses import answer_loss, label_word_loss
from post_shared.memory import plan_step, runs_prompt_once
from post_shared.packing import logits_behind
from post_shared.replays import recorder_of, replays
from post_shared.soft_prompt import SoftPrompt
from post_shared.tasks import MASK, TEXT, Task
from post_shared.training import Checkpoint, Loss, PromptOptimizer, Reporter, Split, ignore, train_prompt

STARTS = ("task", "random")
ITERATES = ("last", "average")
PUBLIC_BATCH = 32
"""Texts on which the lean is measured in each step of a private run."""
OWN_BATCH = 16
"""The same where nothing is private: what a lean of few texts lacks only tells in the next steps."""


@dataclass(frozen=True)
class TuneConfig:
    """How to tune. ``learning_rate`` falls linearly to 0; on a small student it matters more than all else."""

    length: int = 20
    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 0.02
    max_length: int = 128
    seed: int = 0
    start: str = "task"
    """What the prompt starts from: ``task``, the embeddings of a text that states it, or ``random`` rows of the
    vocabulary."""
    iterate: str = "last"
    """What is kept: the ``last`` iterate, or the ``average`` of those of the second half; never the best by a score."""

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise InvalidInput(f"a prompt starts from {' or '.join(STARTS)}, not {self.start!r}")
        if self.iterate not in ITERATES:
            raise InvalidInput(f"the iterate that is kept is {' or '.join(ITERATES)}, not {self.iterate!r}")
        if min(self.length, self.steps, self.batch_size, self.max_length) < 1:
            raise InvalidInput("length, steps, batch size and maximum length are at least 1")
        if not (isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InvalidInput(f"the learning rate is a finite number above 0, not {self.learning_rate}")


PLAIN = TuneConfig()


def tuning_objective(model: LanguageModel, task: Task) -> Loss:
    """``loss(prompt, batch) -> (B,)``: cross-entropy of the label-word scores, or over the answer's tokens."""
    if task.is_generation:

        def generation(prompt: Tensor, batch: Batch) -> Tensor:
            logits = logits_behind(model, batch, prompt)  # (P, V)
            place = logits.device
            return answer_loss(logits, batch.tokens.to(place), batch.rows.to(place), len(batch))

        return generation
    words = label_words(model, task)

    def classification(prompt: Tensor, batch: Batch) -> Tensor:
        scores = words.scores(logits_behind(model, batch, prompt, words.token_ids))  # (B, C)
        return label_word_loss(scores, batch.labels.to(scores.device))

    return classification


def starting_prompt(model: LanguageModel, task: Task, config: TuneConfig) -> SoftPrompt:
    """The prompt before tuning. A text that states the task is its description, or else its template."""
    if config.start == "random":
        return SoftPrompt.random(model, config.length, config.seed)
    return SoftPrompt.from_text(model, task.description or template_words(task), config.length)


def template_words(task: Task) -> str:
    """What the template says around the text."""
    return task.template.replace(TEXT, " ").replace(MASK, " ").strip() or "Answer:"


def check_rows(task: Task, rows: Sequence[Row]) -> None:
    """Raise :class:`DataInvalid` on data that can't be tuned on: empty, unlabelled, foreign labels, one class."""
    if not rows:
        raise DataInvalid("there are no rows to tune on")
    unlabelled = sum(row.label is None for row in rows)
    if unlabelled:
        raise DataInvalid(f"{unlabelled} of {len(rows)} rows have no label; tuning needs one for each")
    if not task.is_generation:
        check_labels(task, rows)
        seen = Counter(row.label for row in rows)
        if len(seen) < 2:
            whose = "the only row has" if len(rows) == 1 else f"all {len(rows)} rows have"
            raise DataInvalid(f"{whose} the label {next(iter(seen))!r}; tuning needs two classes at least")


def train_on_task(
    model: LanguageModel,
    task: Task,
    optimizer: PromptOptimizer,
    batches: Callable[[int], Batch],
    config: TuneConfig,
    *,
    steps: int,
    lean: LeanFreeLoss | None = None,
    report: Reporter = ignore,
    checkpoint: Checkpoint | None = None,
    also: Callable[[int], Mapping[str, float]] = lambda step: {},
) -> SoftPrompt:
    """Train the optimizer's prompt for ``task`` on the frozen ``model``; with ``lean`` (:func:`lean_for`), free of it.

    Raises:
        Cancelled: raised by ``report``; the state is kept first.
    """
    objective = tuning_objective(model, task) if lean is None else lean

    def batch(step: int) -> Batch:
        if lean is not None:  # measured anew before each step
            lean.look(step, optimizer.prompt)
        return batches(step)

    averaged = Averaged(optimizer, since=steps // 2) if config.iterate == "average" else None
    with replays(model, recorder_of(model)):
        tuned = train_prompt(
            averaged or optimizer,
            objective,
            batch,
            steps=steps,
            learning_rate=config.learning_rate,
            stage="tune",
            report=report,
            checkpoint=checkpoint,
            also=also,
        )
    return SoftPrompt(averaged.average if averaged else tuned)


def lean_for(
    model: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    public: Sequence[str] | None,
    config: TuneConfig,
    *,
    private: bool,
    per_row: bool | None = None,
) -> LeanFreeLoss | None:
    """The loss that is free of the lean which shows on ``public`` texts.

    Without these, where no privacy is promised, the rows' own texts stand in their place; None if they can't help.
    ``per_row`` as in :class:`post_shared.lean.LeanFreeLoss`; by default it is as ``private``.

    Raises:
        DataInvalid, InvalidInput: as :class:`post_shared.lean.LeanFreeLoss`.
    """
    texts = public if public is not None or private else _own_texts(task, rows)
    if texts is None:
        return None
    return LeanFreeLoss(
        model,
        task,
        texts,
        batch_size=PUBLIC_BATCH if private else OWN_BATCH,
        max_length=config.max_length,
        room=config.length,
        per_row=private if per_row is None else per_row,
    )


def planned(
    model: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    public: Sequence[str] | None,
    encoded: EncodedRows,
    config: TuneConfig,
    *,
    private: bool,
) -> tuple[Split, LeanFreeLoss | None]:
    """How a plain step on ``encoded`` is cut so that it fits the free memory, and the loss free of the lean, if any.

    The lean's texts stay until the end of a plain step, so the rows get what these leave. Of a private run nothing may
    depend on what is free, nor whether it begins on how long one row is: its micro-batches are given, its check is for
    the longest row that there may be.

    Raises:
        OutOfMemory: a step on a single row, with the lean's texts, doesn't fit.
        DataInvalid, InvalidInput: as :class:`post_shared.lean.LeanFreeLoss`.
    """
    lean = lean_for(model, task, rows, public, config, private=private)
    held, longest = lean.held if lean else 0, config.length + (config.max_length if private else encoded.whole.longest)
    plan = plan_step(model, longest=longest + held)
    left = replace(plan, positions=plan.positions - held)
    return left.cut(config.length, packed=runs_prompt_once(model, longest)), lean


def _own_texts(task: Task, rows: Sequence[Row]) -> list[str] | None:
    texts = list(dict.fromkeys(row.text for row in rows))
    return None if task.is_generation or len(texts) < LEAST_TEXTS else texts
