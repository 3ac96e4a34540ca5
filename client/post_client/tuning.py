"""Tune a soft prompt on the student with private data (method §2), plainly or with differential privacy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

import post_client
import post_shared
from post_client.ledger import Charge, Reserve, Run
from post_client.privacy import PrivacyConfig, PrivacyPlan, PrivacyStatement, default_delta
from post_client.privacy.statement import also_public, library_versions
from post_client.privacy.users import rows_by_user, users_of
from post_client.student_checks import check_rows_are_apart, check_vocabulary
from post_shared.batches import Batch, EncodedRows, ShuffledBatches, encode_rows
from post_shared.data import Row
from post_shared.devices import processor
from post_shared.language_model import LanguageModel
from post_shared.prompt_tuning import (
    PLAIN,
    TuneConfig,
    check_rows,
    planned,
    starting_prompt,
    train_on_task,
    tuning_objective,
)
from post_shared.soft_prompt import SoftPrompt
from post_shared.tasks import Task
from post_shared.training import Checkpoint, PromptAdam, PromptOptimizer, Reporter, Split, fingerprint, ignore

__all__ = [
    "PLAIN",
    "PRIVATE",
    "TuneConfig",
    "TuneResult",
    "charge_of",
    "check_rows",
    "encode_private",
    "starting_prompt",
    "tune",
    "tuning_objective",
    "work_of",
]

PRIVATE = TuneConfig(steps=80, batch_size=64, learning_rate=0.015)
"""Defaults with differential privacy. The noise of a step is shared by its batch, so fewer, larger batches carry less
of it for about the same number of rows seen."""


@dataclass(frozen=True)
class TuneResult:
    """``prompt`` may leave the machine; the rest of what tuning saw may not.

    ``statement`` says what is guaranteed about it; None when it was tuned without differential privacy. ``run`` is what
    the ledger charged: finish it there (:meth:`post_client.ledger.Ledger.finish`) when the prompt is kept.
    """

    prompt: SoftPrompt
    statement: PrivacyStatement | None
    run: Run | None = None


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
    reserve: Reserve | None = None,
) -> TuneResult:
    """Tune a prompt for ``task`` on the frozen ``student``; with ``privacy`` by PromptDPSGD.

    ``public`` are texts that anyone may know, of the kind of the private ones, without labels. They show what the
    prompt leans to whatever the text (:mod:`post_shared.lean`); with that taken off, far more is learnt for the same ε.
    Without ``privacy``, and without ``public``, the private texts themselves show it.

    A private run has its number of steps fixed in advance and returns its last iterate: choosing a step by a
    private score would cost budget. With a ``checkpoint`` folder, a killed run goes on where it was; the folder
    stays on this machine.

    ``reserve`` charges the run to a ledger (:meth:`post_client.ledger.Ledger.reserve`) right before the first step.
    None: nobody adds up what the runs on these rows spend.

    Raises:
        DataInvalid: empty, unlabelled or foreign rows, or a single class; too few public texts.
        InvalidInput: public texts for a generation task.
        TaskInvalid: label words that this model's tokenizer can't tell apart.
        ModelUnsafe: the student's tokenizer has tokens that the student doesn't, or (with ``privacy``) its answer to
            a text depends on the texts beside it.
        PrivacyInvalid: (ε, δ) that give no guarantee for so many rows (or users).
        OutOfMemory: a step on a single row doesn't fit the free memory.
        BudgetExceeded, LedgerInvalid: raised by ``reserve``; nothing was trained.
        Cancelled: raised by ``report``; the state is kept first.
    """
    check_rows(task, rows)
    check_vocabulary(student)
    encoded = encode_private(student, task, rows, config)
    tuning_objective(student, task)  # what can't be tuned on is found out before anything is charged
    split, lean = planned(student, task, rows, public, encoded, config, private=privacy is not None)
    prompt = nn.Parameter(starting_prompt(student, task, config).embeddings.clone().to(student.device))
    plan = _plan(rows, config, privacy)
    if plan is not None:
        check_rows_are_apart(student, prompt.detach(), config.max_length)
    work = work_of(student, task, rows, config, privacy, public) if reserve or checkpoint else ""
    run = None
    if reserve is not None:
        run = reserve(rows, charge_of(rows, config, privacy), work)
        work = fingerprint(work, run.name)  # a checkpoint of a finished run is not gone on from
        plan = None if plan is None else plan.drawing_from(run.key)
    if plan is None:
        parts = _plain(encoded, prompt, config, split)
    else:
        parts = _private(plan, rows, encoded, prompt, config, student)
    tuned = train_on_task(
        student,
        task,
        parts.optimizer,
        parts.batches,
        config,
        steps=parts.steps,
        lean=lean,
        report=report,
        checkpoint=Checkpoint(checkpoint, work, checkpoint_seconds) if checkpoint else None,
        also=parts.spent,
    )
    return TuneResult(tuned, None if plan is None else _statement(plan, config, rows, public), run)


def work_of(
    student: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    config: TuneConfig,
    privacy: PrivacyConfig | None,
    public: Sequence[str] | None,
) -> str:
    """A name for this very tuning: equal for equal models, rows, settings and machinery. It stays on this machine.

    Runs of one name draw the same noise, so whatever else moves a gradient, be it by rounding, has to be in it.
    """
    model = student.config.to_dict() | {"_name_or_path": ""}, student.tokenizer.backend_tokenizer.to_str()
    numbers = str(student.device), str(student.dtype), torch.get_float32_matmul_precision(), torch.get_num_threads()
    machinery = *numbers, processor(student.device), library_versions(), _sources()
    every = list(map(asdict, rows))
    return fingerprint(config, privacy, repr(task), public, every, model, machinery, *student.model.parameters())


@cache
def _sources() -> str:
    """A digest of the code that makes a gradient: of one version there are many."""
    folders = [Path(str(package.__file__)).parent for package in (post_client, post_shared)]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def charge_of(rows: Sequence[Row], config: TuneConfig, privacy: PrivacyConfig | None) -> Charge:
    """What such a run does to its rows, for the ledger.

    Raises:
        PrivacyInvalid: (ε, δ) that give no guarantee for so many rows (or users).
    """
    plan = _plan(rows, config, privacy)
    if plan is None:
        return Charge("row", default_delta(len(rows)), None)
    return Charge(plan.config.unit, plan.delta, plan.mechanism)


# --- plainly, and privately ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """What differs between the two: the optimizer, its batches, and what a step is said to have spent."""

    optimizer: PromptOptimizer
    batches: Callable[[int], Batch]
    steps: int
    spent: Callable[[int], Mapping[str, float]]


def _plan(rows: Sequence[Row], config: TuneConfig, privacy: PrivacyConfig | None) -> PrivacyPlan | None:
    if privacy is None:
        return None
    units = len(rows) if privacy.unit == "row" else len(set(users_of(rows)))
    return privacy.plan(units, batch_size=config.batch_size, steps=config.steps)


def _statement(
    plan: PrivacyPlan, config: TuneConfig, rows: Sequence[Row], public: Sequence[str] | None
) -> PrivacyStatement:
    return replace(plan.statement(config.iterate), also_public=also_public(rows, public or ()))


def _plain(encoded: EncodedRows, prompt: nn.Parameter, config: TuneConfig, split: Split) -> _Parts:
    optimizer = PromptAdam(prompt, config.learning_rate, split)
    batches = ShuffledBatches(encoded, config.batch_size, config.seed)
    return _Parts(optimizer, batches, config.steps, lambda step: {})


def _private(
    plan: PrivacyPlan,
    rows: Sequence[Row],
    encoded: EncodedRows,
    prompt: nn.Parameter,
    config: TuneConfig,
    student: LanguageModel,
) -> _Parts:
    sampler, users = plan.sampler(), None
    members: Sequence[Sequence[int]] = [[at] for at in range(len(rows))]
    if plan.config.unit == "user":
        users = users_of(rows)
        members = rows_by_user(users)

    def batch(step: int) -> Batch:
        return encoded.batch([row for unit in sampler.draw(step) for row in members[unit]])

    optimizer = plan.optimizer(prompt, config.learning_rate, users, longest=config.max_length, student=student)
    return _Parts(optimizer, batch, plan.steps, lambda step: {"epsilon": plan.epsilon_after(step)})
