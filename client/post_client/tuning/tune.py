"""Tune a soft prompt on the student with private data (method §2), plainly or with differential privacy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

import post_shared
from post_client.ledger import Charge, Reserve, Run
from post_client.privacy import Canaries, PoissonSampler, PrivacyConfig, PrivacyPlan, PrivacyStatement, default_delta
from post_client.privacy.statement import also_public, library_versions
from post_client.privacy.user_level import rows_by_user, users_of
from post_client.students.checks import check_rows_are_apart, check_vocabulary
from post_shared.data.batches import Batch, EncodedRows, ShuffledBatches
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.method.tuning.label_bias import CalibratedLoss
from post_shared.method.tuning.tune import check_rows, planned, starting_prompt, train_on_task, tuning_objective
from post_shared.model.devices import processor
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.checkpoint import Checkpoint, fingerprint
from post_shared.training.optimizer import PromptAdam, PromptOptimizer, Split
from post_shared.training.progress import ProgressCallback, ignore

__all__ = ["TuneResult", "charge_of", "check_rows", "encode_private", "run_id_of", "starting_prompt", "train", "tune"]


@dataclass(frozen=True)
class TuneResult:
    """``prompt`` may leave the machine; the rest of what tuning saw may not.

    ``statement`` says what is guaranteed about it; None when it was tuned without differential privacy. ``run`` is what
    the ledger charged: finish it there (:meth:`post_client.ledger.Ledger.finish`) when the prompt is kept.
    """

    prompt: SoftPrompt
    statement: PrivacyStatement | None
    run: Run | None = None


def encode_private(model: LanguageModel, task: Task, rows: Sequence[Row], options: TuneOptions) -> EncodedRows:
    """The private rows as token ids, with room for the prompt."""
    texts, labels = [row.text for row in rows], [row.label for row in rows]
    return encode_rows(model, task, texts, options.max_length, labels=labels, reserved=options.num_virtual_tokens)


def tune(
    student: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    options: TuneOptions,
    *,
    privacy: PrivacyConfig | None,
    public: Sequence[str] | None = None,
    on_progress: ProgressCallback = ignore,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    reserve: Reserve | None = None,
) -> TuneResult:
    """Tune a prompt for ``task`` on the frozen ``student``; with ``privacy`` by PromptDPSGD.

    ``public`` are texts that anyone may know, of the kind of the private ones, without labels. They show what the
    prompt leans to whatever the text (:mod:`post_shared.method.tuning.label_bias`); with that taken off, far more is learnt for the same ε.
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
        Cancelled: raised by ``on_progress``; the state is kept first.
    """
    check_rows(task, rows)
    check_vocabulary(student)
    encoded = encode_private(student, task, rows, options)
    tuning_objective(student, task)  # what can't be tuned on is found out before anything is charged
    split, calibrated = planned(student, task, rows, public, encoded, options, private=privacy is not None)
    plan = plan_of(rows, options, privacy)
    if plan is not None:
        check_rows_are_apart(student, starting_prompt(student, task, options).embeddings, options.max_length)
    run_id = run_id_of(student, task, rows, options, privacy, public) if reserve or checkpoint else ""
    run = None
    if reserve is not None:
        run = reserve(rows, charge_of(rows, options, privacy), run_id)
        run_id = fingerprint(run_id, run.name)  # a checkpoint of a finished run is not gone on from
        plan = None if plan is None else plan.drawing_from(run.key)
    kept = Checkpoint(checkpoint, run_id, checkpoint_seconds) if checkpoint else None
    ready = Prepared(student, task, rows, encoded, options, plan, split, calibrated)
    tuned = train(ready, on_progress=on_progress, checkpoint=kept)
    return TuneResult(tuned, None if plan is None else _statement(plan, options, rows, public), run)


@dataclass(frozen=True)
class Prepared:
    """A tuning whose parts were checked: what :func:`train` needs."""

    student: LanguageModel
    task: Task
    rows: Sequence[Row]
    encoded: EncodedRows
    options: TuneOptions
    plan: PrivacyPlan | None
    split: Split
    calibrated: CalibratedLoss | None
    canaries: Canaries | None = None


def train(
    ready: Prepared, *, on_progress: ProgressCallback = ignore, checkpoint: Checkpoint | None = None
) -> SoftPrompt:
    """Train a prompt, plainly or, with a plan, privately."""
    start = starting_prompt(ready.student, ready.task, ready.options).embeddings
    prompt = nn.Parameter(start.clone().to(ready.student.device))
    parts = _plain(ready, prompt) if ready.plan is None else _private(ready, ready.plan, prompt)
    return train_on_task(
        ready.student,
        ready.task,
        parts.optimizer,
        parts.batches,
        ready.options,
        steps=parts.steps,
        calibrated=ready.calibrated,
        on_progress=on_progress,
        checkpoint=checkpoint,
        also=parts.spent,
    )


def run_id_of(
    student: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    options: TuneOptions,
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
    return fingerprint(options, privacy, repr(task), public, every, model, machinery, *student.model.parameters())


@cache
def _sources() -> str:
    """A digest of the code that makes a gradient: of one version there are many."""
    folders = [Path(__file__).parents[1], Path(str(post_shared.__file__)).parent]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def charge_of(rows: Sequence[Row], options: TuneOptions, privacy: PrivacyConfig | None) -> Charge:
    """What such a run does to its rows, for the ledger.

    Raises:
        PrivacyInvalid: (ε, δ) that give no guarantee for so many rows (or users).
    """
    plan = plan_of(rows, options, privacy)
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


def plan_of(rows: Sequence[Row], options: TuneOptions, privacy: PrivacyConfig | None) -> PrivacyPlan | None:
    if privacy is None:
        return None
    units = len(rows) if privacy.unit == "row" else len(set(users_of(rows)))
    return PrivacyPlan.make(privacy, units, batch_size=options.batch_size, steps=options.steps)


def _statement(
    plan: PrivacyPlan, options: TuneOptions, rows: Sequence[Row], public: Sequence[str] | None
) -> PrivacyStatement:
    return replace(plan.statement(options.average_iterates), also_public=also_public(rows, public or ()))


def _plain(ready: Prepared, prompt: nn.Parameter) -> _Parts:
    options = ready.options
    optimizer = PromptAdam(prompt, options.learning_rate, ready.split)
    batches = ShuffledBatches(ready.encoded, options.batch_size, options.seed)
    return _Parts(optimizer, batches, options.steps, lambda step: {})


def _private(ready: Prepared, plan: PrivacyPlan, prompt: nn.Parameter) -> _Parts:
    users = users_of(ready.rows) if plan.config.unit == "user" else None
    members = [[at] for at in range(len(ready.rows))] if users is None else rows_by_user(users)
    sampler = PoissonSampler(max(1, len(members)), plan.rate, plan.randomness)
    options = ready.options

    def batch(step: int) -> Batch:
        return ready.encoded.batch([row for unit in sampler.draw(step) for row in members[unit]])

    optimizer = plan.optimizer(prompt, options.learning_rate, users, longest=options.max_length, student=ready.student)
    optimizer.canaries = ready.canaries
    return _Parts(optimizer, batch, plan.steps, lambda step: {"epsilon": plan.epsilon_after(step)})
