"""Tune a soft prompt on the student with private data (method §2), plainly or with differential privacy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from post_client.lean import LEAST_TEXTS, LeanFreeLoss
from post_client.privacy import PrivacyConfig, PrivacyStatement
from post_client.student_checks import check_rows_are_apart, check_vocabulary
from post_shared.batches import Batch, EncodedRows, ShuffledBatches, encode_rows
from post_shared.data import Row
from post_shared.errors import DataInvalid, InvalidInput
from post_shared.evaluation import check_labels
from post_shared.label_words import label_words
from post_shared.language_model import LanguageModel
from post_shared.losses import answer_loss, label_word_loss
from post_shared.soft_prompt import SoftPrompt
from post_shared.tasks import MASK, TEXT, Task
from post_shared.training import (
    Checkpoint,
    Loss,
    PromptAdam,
    PromptOptimizer,
    Reporter,
    fingerprint,
    ignore,
    train_prompt,
)

STARTS = ("task", "random")
PUBLIC_BATCH = 32
"""Texts on which the lean is measured in each step."""


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

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise InvalidInput(f"a prompt starts from {' or '.join(STARTS)}, not {self.start!r}")
        if min(self.length, self.steps, self.batch_size, self.max_length) < 1:
            raise InvalidInput("length, steps, batch size and maximum length are at least 1")
        if self.learning_rate <= 0:
            raise InvalidInput(f"the learning rate is above 0, not {self.learning_rate}")


PLAIN = TuneConfig()
PRIVATE = TuneConfig(steps=80, batch_size=64, learning_rate=0.015)
"""Defaults with differential privacy. The noise of a step is shared by its batch, so fewer, larger batches carry less
of it for about the same number of rows seen."""


@dataclass(frozen=True)
class TuneResult:
    """``prompt`` may leave the machine; the rest of what tuning saw may not.

    ``statement`` says what is guaranteed about it; None when it was tuned without differential privacy.
    """

    prompt: SoftPrompt
    statement: PrivacyStatement | None


def tuning_objective(model: LanguageModel, task: Task) -> Loss:
    """``loss(prompt, batch) -> (B,)``: cross-entropy of the label-word scores, or over the answer's tokens."""
    if task.is_generation:

        def generation(prompt: Tensor, batch: Batch) -> Tensor:
            logits = model.answer_logits(batch, prompt)  # (P, V)
            place = logits.device
            return answer_loss(logits, batch.tokens.to(place), batch.rows.to(place), len(batch))

        return generation
    words = label_words(model, task)

    def classification(prompt: Tensor, batch: Batch) -> Tensor:
        scores = words.scores(model.answer_logits(batch, prompt))  # (B, C)
        return label_word_loss(scores, batch.labels.to(scores.device))

    return classification


def starting_prompt(model: LanguageModel, task: Task, config: TuneConfig) -> SoftPrompt:
    """The prompt before tuning. A text that states the task is its description, or else its template."""
    if config.start == "random":
        return SoftPrompt.random(model, config.length, config.seed)
    text = task.description or task.template.replace(TEXT, " ").replace(MASK, " ").strip() or "Answer:"
    return SoftPrompt.from_text(model, text, config.length)


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
            raise DataInvalid(
                f"all {len(rows)} rows have the label {next(iter(seen))!r}; tuning needs two classes at least"
            )


def encode_private(model: LanguageModel, task: Task, rows: Sequence[Row], config: TuneConfig) -> EncodedRows:
    """The private rows as token ids, with room for the prompt."""
    texts, labels = [row.text for row in rows], [row.label for row in rows]
    return encode_rows(model, task, texts, config.max_length, labels=labels, room=config.length)


def tune(
    student: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    config: TuneConfig,
    *,
    privacy: PrivacyConfig | None,
    public: Sequence[str] | None = None,
    report: Reporter = ignore,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> TuneResult:
    """Tune a prompt for ``task`` on the frozen ``student``; with ``privacy`` by PromptDPSGD.

    ``public`` are texts that anyone may know, of the kind of the private ones, without labels. They show what the
    prompt leans to whatever the text (:mod:`post_client.lean`); with that taken off, far more is learnt for the same ε.
    Without ``privacy``, and without ``public``, the private texts themselves show it.

    A private run has its number of steps fixed in advance and returns its last iterate: choosing a step by a
    private score would cost budget. With a ``checkpoint`` folder, a killed run goes on where it was; the folder
    stays on this machine.

    Raises:
        DataInvalid: empty, unlabelled or foreign rows, or a single class; too few public texts.
        InvalidInput: public texts for a generation task.
        TaskInvalid: label words that this model's tokenizer can't tell apart.
        ModelUnsafe: the student's tokenizer has tokens that the student doesn't, or (with ``privacy``) its answer to
            a text depends on the texts beside it.
        PrivacyInvalid: (ε, δ) that give no guarantee for so many rows.
        Cancelled: raised by ``report``; the state is kept first.
    """
    check_rows(task, rows)
    check_vocabulary(student)
    encoded = encode_private(student, task, rows, config)
    prompt = nn.Parameter(starting_prompt(student, task, config).embeddings.clone().to(student.device))
    kept = None
    if checkpoint:
        work = fingerprint(
            config, privacy, task.form().model_dump(), public, list(map(asdict, rows)), *student.model.parameters()
        )
        kept = Checkpoint(checkpoint, work, checkpoint_seconds)
    optimizer: PromptOptimizer = PromptAdam(prompt, config.learning_rate)
    batches: Callable[[int], Batch] = ShuffledBatches(encoded, config.batch_size, config.seed)
    spent: Callable[[int], Mapping[str, float]] = lambda step: {}  # noqa: E731
    steps, statement = config.steps, None
    if privacy is not None:
        check_rows_are_apart(student, prompt.detach(), config.max_length)
        plan = privacy.plan(len(rows), batch_size=config.batch_size, steps=config.steps)
        sampler = plan.sampler()
        optimizer = plan.optimizer(prompt, config.learning_rate)
        batches = lambda step: encoded.batch(sampler.draw(step).tolist())  # noqa: E731
        spent = lambda step: {"epsilon": plan.epsilon_after(step)}  # noqa: E731
        steps, statement = plan.steps, plan.statement()
    objective = tuning_objective(student, task)
    if public is None and privacy is None:
        public = _own_texts(task, rows)
    if public is not None:
        objective, batches = _free_of_lean(student, task, public, config, prompt, batches)
    tuned = train_prompt(
        optimizer,
        objective,
        batches,
        steps=steps,
        learning_rate=config.learning_rate,
        stage="tune",
        report=report,
        checkpoint=kept,
        also=spent,
    )
    return TuneResult(SoftPrompt(tuned), statement)


def _own_texts(task: Task, rows: Sequence[Row]) -> list[str] | None:
    """The private texts in the place of public ones, where no privacy is promised; None if they can't help."""
    texts = list(dict.fromkeys(row.text for row in rows))
    return None if task.is_generation or len(texts) < LEAST_TEXTS else texts


def _free_of_lean(
    model: LanguageModel,
    task: Task,
    texts: Sequence[str],
    config: TuneConfig,
    prompt: Tensor,
    batches: Callable[[int], Batch],
) -> tuple[Loss, Callable[[int], Batch]]:
    """The loss without the lean, and batches before each of which the lean of ``prompt`` is measured anew."""
    loss = LeanFreeLoss(model, task, texts, batch_size=PUBLIC_BATCH, max_length=config.max_length, room=config.length)

    def batch(step: int) -> Batch:
        loss.look(step, prompt)
        return batches(step)

    return loss, batch
