"""Tune a soft prompt on the student with private data (method §2), plainly or with differential privacy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from post_client.privacy import PrivacyConfig, PrivacyStatement
from post_client.student_checks import check_rows_are_apart, check_vocabulary
from post_shared.batches import Batch, EncodedRows, ShuffledBatches, encode_rows
from post_shared.data import Row
from post_shared.language_model import LanguageModel
from post_shared.prompt_tuning import (
    PLAIN,
    TuneConfig,
    check_rows,
    own_texts,
    starting_prompt,
    train_on_task,
    tuning_objective,
)
from post_shared.soft_prompt import SoftPrompt
from post_shared.tasks import Task
from post_shared.training import Checkpoint, PromptAdam, PromptOptimizer, Reporter, fingerprint, ignore

__all__ = [
    "PLAIN",
    "PRIVATE",
    "TuneConfig",
    "TuneResult",
    "check_rows",
    "encode_private",
    "starting_prompt",
    "tune",
    "tuning_objective",
]

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
    prompt leans to whatever the text (:mod:`post_shared.lean`); with that taken off, far more is learnt for the same ε.
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
    if public is None and privacy is None:
        public = own_texts(task, rows)
    tuned = train_on_task(
        student,
        task,
        optimizer,
        batches,
        config,
        steps=steps,
        public=public,
        report=report,
        checkpoint=kept,
        also=spent,
    )
    return TuneResult(tuned, statement)
