"""Tune a soft prompt on the student with private data (method §2), with or without differential privacy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from itertools import chain
from pathlib import Path

import torch
from torch import nn

import post_shared
from post_client.ledger import Charge, Reserve, Run
from post_client.privacy import DEFAULT_DELTA, Canaries, PoissonSampler, PrivacyConfig, PrivacyPlan, PrivacyStatement
from post_client.privacy.statement import also_public, library_versions
from post_client.privacy.user_level import rows_by_user, users_of
from post_client.students.bounded_tokenizer import encode_private
from post_client.students.checks import check_keeps_no_state, check_tokenizer, digest_of
from post_shared.data.batches import Batch, EncodedRows, ShuffledBatches
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.method.tuning.label_bias import CalibratedLoss
from post_shared.method.tuning.tune import check_rows, plan_tuning, starting_prompt, train_on_task, tuning_objective
from post_shared.model.devices import processor
from post_shared.model.language_model import LanguageModel
from post_shared.model.soft_prompt import SoftPrompt
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.checkpoint import Checkpoint, fingerprint
from post_shared.training.optimizer import PromptAdam, PromptOptimizer, Split
from post_shared.training.progress import ProgressCallback, ignore

__all__ = ["TuneResult", "charge_of", "check_rows", "encode_private", "run_id_of", "starting_prompt", "train", "tune"]


@dataclass(frozen=True)
class TuneResult:
    """A tuned prompt. Only ``prompt`` may leave the machine.

    ``statement`` is its privacy guarantee, None without differential privacy. ``run`` is the run charged to the ledger:
    call :meth:`post_client.ledger.Ledger.finish` once the prompt is saved.
    """

    prompt: SoftPrompt
    statement: PrivacyStatement | None
    run: Run | None = None


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

    ``public``: unlabelled public texts, similar to the private ones. The prompt's label bias is measured on them and
    removed (:mod:`post_shared.method.tuning.label_bias`), which improves accuracy at the same ε. Without ``privacy``
    and ``public``, it is measured on the private texts.

    A private run has a fixed number of steps and returns its last iterate, since choosing a step by a private score
    would cost budget. With a ``checkpoint`` folder, an interrupted run resumes; the folder stays on this machine.

    ``reserve`` charges the run to a ledger (:meth:`post_client.ledger.Ledger.reserve`) right before the first step.
    With None, the run isn't recorded in any ledger.

    Raises:
        DataInvalid: no rows, rows without a label or with an unknown one, a single class, or too few public texts.
        InvalidInput: public texts for a generation task.
        TaskInvalid: label words that this model's tokenizer can't distinguish.
        ModelUnsafe: the tokenizer fails :func:`post_client.students.checks.check_tokenizer` or, with ``privacy``, the
            student fails :func:`post_client.students.checks.check_keeps_no_state`.
        PrivacyInvalid: (ε, δ) give no guarantee for this number of rows (or users).
        OutOfMemory: a step on a single row doesn't fit the free memory.
        BudgetExceeded, LedgerInvalid: raised by ``reserve``; nothing was trained.
        Cancelled: raised by ``on_progress``; the state is saved first.
    """
    check_rows(task, rows)
    check_tokenizer(student)
    encoded = encode_private(student, task, rows, options)
    tuning_objective(student, task)  # refuses an unusable task before anything is charged
    split, calibrated = plan_tuning(student, task, rows, public, encoded, options, private=privacy is not None)
    plan = plan_of(rows, options, privacy)
    if plan is not None:
        check_keeps_no_state(student, starting_prompt(student, task, options).embeddings, options.max_length)
    run_id = run_id_of(student, task, rows, options, privacy, public, encoded) if reserve or checkpoint else ""
    run = None
    if reserve is not None:
        run = reserve(rows, charge_of(rows, options, privacy), run_id)
        run_id = fingerprint(run_id, run.name)  # a new run never resumes from a finished run's checkpoint
        plan = None if plan is None else plan.with_key(run.key)
    saved_state = Checkpoint(checkpoint, run_id, checkpoint_seconds) if checkpoint else None
    prepared = Prepared(student, task, rows, encoded, options, plan, split, calibrated)
    prompt = train(prepared, on_progress=on_progress, checkpoint=saved_state)
    return TuneResult(prompt, None if plan is None else _statement(plan, options, rows, public), run)


@dataclass(frozen=True)
class Prepared:
    """The checked inputs of :func:`train`."""

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
    prepared: Prepared, *, on_progress: ProgressCallback = ignore, checkpoint: Checkpoint | None = None
) -> SoftPrompt:
    """Train a prompt; with a plan, by PromptDPSGD."""
    start = starting_prompt(prepared.student, prepared.task, prepared.options).embeddings
    prompt = nn.Parameter(start.clone().to(prepared.student.device))
    setup = _plain_setup(prepared, prompt) if prepared.plan is None else _private_setup(prepared, prepared.plan, prompt)
    return train_on_task(
        prepared.student,
        prepared.task,
        setup.optimizer,
        setup.batches,
        prepared.options,
        steps=setup.steps,
        calibrated=prepared.calibrated,
        on_progress=on_progress,
        checkpoint=checkpoint,
        also=setup.spent,
    )


def run_id_of(
    student: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    options: TuneOptions,
    privacy: PrivacyConfig | None,
    public: Sequence[str] | None,
    encoded: EncodedRows,
) -> str:
    """The id of a tuning run: equal for equal models, rows, settings and environment. It stays on this machine.

    Runs with the same id draw the same noise, so the id covers everything that changes a gradient, even by rounding.
    """
    config = student.config.to_dict() | {"_name_or_path": "", "attention": str(student.config._attn_implementation)}
    tokenizer = student.tokenizer.backend_tokenizer.to_str(), str(student.tokenizer.special_tokens_map)
    inputs = list(map(asdict, encoded.rows))  # a tokenizer may give the same rows other tokens
    numerics = str(student.device), str(student.dtype), torch.get_float32_matmul_precision(), torch.get_num_threads()
    environment = *numerics, processor(student.device), library_versions(), _sources()
    row_values = list(map(asdict, rows))
    state = digest_of(chain(student.model.named_parameters(), student.model.named_buffers()))
    return fingerprint(options, privacy, repr(task), public, row_values, inputs, config, tokenizer, environment, state)


@cache
def _sources() -> str:
    """A digest of the source code: a version number doesn't cover local changes."""
    folders = [Path(__file__).parents[1], Path(str(post_shared.__file__)).parent]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def charge_of(rows: Sequence[Row], options: TuneOptions, privacy: PrivacyConfig | None) -> Charge:
    """What the ledger charges for such a run.

    Raises:
        PrivacyInvalid: (ε, δ) give no guarantee for this number of rows (or users).
    """
    plan = plan_of(rows, options, privacy)
    if plan is None:
        return Charge("row", DEFAULT_DELTA, None)
    return Charge(plan.config.unit, plan.delta, plan.mechanism)


# --- without and with differential privacy ------------------------------------------------------------


@dataclass(frozen=True)
class _Setup:
    """The optimizer, its batches, and the metrics of the ε spent after a step: what DP changes."""

    optimizer: PromptOptimizer
    batches: Callable[[int], Batch]
    steps: int
    spent: Callable[[int], Mapping[str, float]]


def plan_of(rows: Sequence[Row], options: TuneOptions, privacy: PrivacyConfig | None) -> PrivacyPlan | None:
    """The plan of a private run; None without ``privacy``."""
    if privacy is None:
        return None
    units = len(rows) if privacy.unit == "row" else len(set(users_of(rows)))
    return PrivacyPlan.make(privacy, units, batch_size=options.batch_size, steps=options.steps)


def _statement(
    plan: PrivacyPlan, options: TuneOptions, rows: Sequence[Row], public: Sequence[str] | None
) -> PrivacyStatement:
    return replace(plan.statement(options.average_iterates), also_public=also_public(rows, public or ()))


def _plain_setup(prepared: Prepared, prompt: nn.Parameter) -> _Setup:
    options = prepared.options
    optimizer = PromptAdam(prompt, options.learning_rate, prepared.split)
    batches = ShuffledBatches(prepared.encoded, options.batch_size, options.seed)
    return _Setup(optimizer, batches, options.steps, lambda step: {})


def _private_setup(prepared: Prepared, plan: PrivacyPlan, prompt: nn.Parameter) -> _Setup:
    options = prepared.options
    users = users_of(prepared.rows) if plan.config.unit == "user" else None
    rows_of_unit = [[row] for row in range(len(prepared.rows))] if users is None else rows_by_user(users)
    sampler = PoissonSampler(max(1, len(rows_of_unit)), plan.rate, plan.randomness)

    def batch(step: int) -> Batch:
        return prepared.encoded.batch([row for unit in sampler.draw(step) for row in rows_of_unit[unit]])

    optimizer = plan.optimizer(prompt, options.learning_rate, users)
    optimizer.canaries = prepared.canaries
    return _Setup(optimizer, batch, plan.steps, lambda step: {"epsilon": plan.epsilon_after(step)})
