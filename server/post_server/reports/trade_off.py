"""The measurements of a trade-off report: accuracy of a student and its target, and what both leak."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from post_server.reports.figures import leakage_figures, measured_loss, task_figures
from post_server.reports.texts import PublicTask
from post_shared.data.batches import ShuffledBatches
from post_shared.inference.evaluation import correct_rows, guess_labels
from post_shared.method.audit.min_k import text_scores
from post_shared.method.transfer.baselines import PUBLIC_TEXTS, calibrated_scores
from post_shared.method.tuning.tune import plan_tuning, starting_prompt, train_on_task
from post_shared.model.encoding import encode_rows
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.reports import Leakage, MeasuredLoss, ReportCreate, TaskFigures
from post_shared.training.checkpoint import Checkpoint, fingerprint
from post_shared.training.optimizer import PromptAdam
from post_shared.training.progress import Progress, ProgressCallback, ignore
from post_shared.training.stages import Stages

TUNING_PASSES = 3.0
"""The cost of a tuning step, in forward passes of its batch."""
CALIBRATION_PASSES = 4
"""The plain template and the instructions."""


@dataclass(frozen=True)
class TradeOff:
    """The measurements. ``members`` and ``non_members`` are the numbers of attacked texts."""

    loss: MeasuredLoss
    tasks: tuple[TaskFigures, ...]
    members: int
    non_members: int
    leakage: tuple[Leakage, ...]


def trade_off(
    target: LanguageModel,
    student: LanguageModel,
    tasks: Sequence[PublicTask],
    members: Sequence[str],
    others: Sequence[str],
    request: ReportCreate,
    *,
    on_progress: ProgressCallback = ignore,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> TradeOff:
    """Measure both models on the same rows and texts.

    ``tasks`` come from :func:`~post_server.reports.texts.split_task`, ``members`` and ``others`` from
    :func:`~post_server.reports.texts.attacked_texts`. With a ``checkpoint`` folder, a killed run resumes at its
    last stage.

    Raises:
        TaskInvalid: label words that the models' tokenizer can't tell apart.
        InvalidInput: a model whose outputs are NaN or infinite, or with too few positions.
        Cancelled: raised by ``on_progress``; finished stages are kept.
    """
    models = {"target": target, "student": student}
    run_id = _fingerprint(models, tasks, members, others, request)
    stages = Stages(_costs(models, tasks, len(members), len(others), request), on_progress, checkpoint, run_id)
    figures = []
    for task in tasks:
        right = {}
        for name, model in models.items():
            own = _checkpoint(checkpoint, f"{name}/{task.dataset}", run_id, checkpoint_seconds)
            right[f"{name}_zero_shot"] = stages.once(f"{name} on {task.dataset}", _zero_shot(model, task, request))
            right[f"{name}_tuned"] = stages.once(f"tuned {name} on {task.dataset}", _tuned(model, task, request, own))
        right["target_calibrated"] = stages.once(
            f"calibrated target on {task.dataset}", _calibrated(target, task, request)
        )
        figures.append(task_figures(task, right, request.seed))
    loss = stages.once("loss", _loss(target, student, others, request.tuning.max_length))
    scores = [
        np.array(stages.once(f"attack on {name}", _scores(model, [*members, *others], request.tuning.max_length)))
        for name, model in models.items()
    ]
    leakage = leakage_figures(scores[0], scores[1], len(members), request.seed)
    return TradeOff(MeasuredLoss(**loss), tuple(figures), len(members), len(others), leakage)


# --- stages: each returns JSON ------------------------------------------------------------------------


Stage = Callable[[ProgressCallback], Any]


def _zero_shot(model: LanguageModel, task: PublicTask, request: ReportCreate) -> Stage:
    return lambda on_progress: _right(model, task, None, request, on_progress)


def _calibrated(target: LanguageModel, task: PublicTask, request: ReportCreate) -> Stage:
    """The target alone, with its label bias on the tuning texts removed: what a prompt must beat."""
    limit, own = request.tuning.max_length, [row.text for row in task.test]

    def run(on_progress: ProgressCallback) -> list[bool]:
        known, ensemble = [row.text for row in task.tune], target.kind == "causal"
        scores = calibrated_scores(
            target, task.task, own, known, ensemble=ensemble, max_length=limit, seed=request.tuning.seed
        )
        on_progress(Progress(1, 1, "calibrated"))
        return correct_rows(task.task, scores.argmax(-1).tolist(), [row.label for row in task.test])

    return run


def _tuned(model: LanguageModel, task: PublicTask, request: ReportCreate, checkpoint: Checkpoint | None) -> Stage:
    """Tune without privacy, as an owner would, then classify the held-out rows."""
    config = request.tuning

    def run(on_progress: ProgressCallback) -> list[bool]:
        texts, labels = [row.text for row in task.tune], [row.label for row in task.tune]
        encoded = encode_rows(
            model, task.task, texts, config.max_length, labels=labels, reserved=config.num_virtual_tokens
        )
        start = starting_prompt(model, task.task, config).embeddings
        split, calibrated = plan_tuning(model, task.task, task.tune, None, encoded, config, private=False)
        prompt = train_on_task(
            model,
            task.task,
            PromptAdam(nn.Parameter(start.clone().to(model.device)), config.learning_rate, split),
            ShuffledBatches(encoded, config.batch_size, config.seed),
            config,
            steps=config.steps,
            calibrated=calibrated,
            on_progress=on_progress,
            checkpoint=checkpoint,
        )
        return _right(model, task, prompt.embeddings, request, lambda _: on_progress(Progress(1, 1, "tune")))

    return run


def _loss(target: LanguageModel, student: LanguageModel, texts: Sequence[str], max_length: int) -> Stage:
    return lambda on_progress: measured_loss(target, student, texts, max_length, on_progress=on_progress)


def _scores(model: LanguageModel, texts: Sequence[str], max_length: int) -> Stage:
    return lambda on_progress: text_scores(model, texts, max_length, on_progress=on_progress).tolist()


def _right(
    model: LanguageModel, task: PublicTask, prompt: Tensor | None, request: ReportCreate, on_progress: ProgressCallback
) -> list[bool]:
    texts = [row.text for row in task.test]
    guesses = guess_labels(model, task.task, texts, prompt, on_progress, max_length=request.tuning.max_length)
    return correct_rows(task.task, guesses, [row.label for row in task.test])


# --- helpers ------------------------------------------------------------------------------------------


def _costs(
    models: Mapping[str, LanguageModel], tasks: Sequence[PublicTask], members: int, others: int, request: ReportCreate
) -> dict[str, float]:
    """The stages in order, each with its approximate cost: parameters times rows."""
    costs: dict[str, float] = {}
    for task in tasks:
        for name, model in models.items():
            tuning = TUNING_PASSES * request.tuning.steps * min(request.tuning.batch_size, len(task.tune))
            costs[f"{name} on {task.dataset}"] = float(model.parameters * len(task.test))
            costs[f"tuned {name} on {task.dataset}"] = model.parameters * (tuning + len(task.test))
        calibration = CALIBRATION_PASSES * (len(task.test) + min(PUBLIC_TEXTS, len(task.tune)))
        costs[f"calibrated target on {task.dataset}"] = float(models["target"].parameters * calibration)
    # A masked model needs a forward pass for each token of a text.
    passes = {name: request.tuning.max_length if model.kind == "masked" else 1 for name, model in models.items()}
    costs["loss"] = float(sum(model.parameters * passes[name] * others for name, model in models.items()))
    attacks = {name: model.parameters * passes[name] * (members + others) for name, model in models.items()}
    return costs | {f"attack on {name}": float(cost) for name, cost in attacks.items()}


def _fingerprint(
    models: Mapping[str, LanguageModel],
    tasks: Sequence[PublicTask],
    members: Sequence[str],
    others: Sequence[str],
    request: ReportCreate,
) -> str:
    rows = [[asdict(row) for row in (*task.tune, *task.test)] for task in tasks]
    return fingerprint(request.model_dump(), rows, list(members), list(others), *models.values())


def _checkpoint(folder: Path | None, what: str, run_id: str, seconds: float) -> Checkpoint | None:
    """The checkpoint of one tuning. Its folder's name is a hash, because a dataset's name may not be a valid one."""
    if folder is None:
        return None
    return Checkpoint(folder / hashlib.sha256(what.encode()).hexdigest()[:16], f"{run_id}/{what}", seconds)
