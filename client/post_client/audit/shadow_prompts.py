"""Shadow prompts: the prompts that ``tune`` would have made of other choices among the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from post_client.privacy import Canaries, PrivacyConfig, PrivacyPlan
from post_client.students.checks import check_rows_are_apart, check_vocabulary
from post_client.tuning.tune import Prepared, check_rows, encode_private, run_id_of, starting_prompt, train
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput
from post_shared.method.audit.lira import Members
from post_shared.method.tuning.tune import planned
from post_shared.model.language_model import LanguageModel
from post_shared.model.verbalizer import label_words
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.checkpoint import Checkpoint, fingerprint
from post_shared.training.progress import Progress, ProgressCallback, ignore

BATCH = 16
"""Rows per pass when confidences are measured."""
CanariesOf = Callable[[int], Canaries | None]
"""The gradient canaries of prompt k, if it has any."""


@dataclass(frozen=True)
class Shadows:
    """Prompts (K, l, d), what each was tuned on, and the plan of each run if they were private."""

    prompts: Tensor
    members: Members
    plan: PrivacyPlan | None


def tune_shadows(
    student: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    members: Members,
    options: TuneOptions,
    *,
    privacy: PrivacyConfig | None,
    public: Sequence[str] | None = None,
    nominal: int | None = None,
    canaries: CanariesOf = lambda k: None,
    stage: str = "shadows",
    on_progress: ProgressCallback = ignore,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> Shadows:
    """Tune one prompt on each choice of rows. Prompt k is what ``tune`` makes of its rows with its seed + k.

    Args:
        nominal: the number of rows that private runs count on, for sampling rate and δ; by default, that of the
            first choice. It is fixed when the choices differ in size, which must not show.
        canaries: gradients that are added to the private steps of prompt k.
        checkpoint: a folder to resume from. It holds prompts tuned on private rows and stays on this machine.

    Raises:
        InvalidInput: a generation task.
        DataInvalid, TaskInvalid, ModelUnsafe, PrivacyInvalid, Cancelled: as ``tune``.
    """
    if task.is_generation:
        raise InvalidInput("an audit scores classes; a generation task has none")
    if options.average_iterates:
        raise InvalidInput("an audit tunes prompts up to their last iterate; leave iterate at last")
    check_rows(task, rows)
    check_vocabulary(student)
    if privacy is not None:
        check_rows_are_apart(student, starting_prompt(student, task, options).embeddings, options.max_length)
    count = nominal or int(members[0].sum())
    run_id = "" if checkpoint is None else run_id_of(student, task, rows, options, privacy, public)
    plan: PrivacyPlan | None = None
    prompts: list[Tensor] = []
    for k, own in enumerate(members):
        some = [rows[at] for at in np.flatnonzero(own).tolist()]
        plan = (
            None
            if privacy is None
            else PrivacyPlan.make(_seeded(privacy, k), count, batch_size=options.batch_size, steps=options.steps)
        )
        ready = _prepared(student, task, some, options.replace(seed=options.seed + k), plan, public, canaries(k))
        kept = None
        if checkpoint is not None:
            name = fingerprint(run_id, own.tolist(), k, nominal, ready.canaries is not None)
            kept = Checkpoint(checkpoint / str(k), name, checkpoint_seconds, keeps_end=True)
        prompts.append(
            train(ready, on_progress=_numbered(on_progress, stage, k, len(members)), checkpoint=kept).embeddings
        )
    return Shadows(torch.stack(prompts).to(student.device), members, plan)


def _seeded(privacy: PrivacyConfig, k: int) -> PrivacyConfig:
    """Noise and batches of their own for each prompt, also where a test has fixed the seed."""
    return privacy if privacy.seed is None else replace(privacy, seed=privacy.seed + k)


def _prepared(
    student: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    options: TuneOptions,
    plan: PrivacyPlan | None,
    public: Sequence[str] | None,
    canaries: Canaries | None,
) -> Prepared:
    encoded = encode_private(student, task, rows, options)
    split, calibrated = planned(student, task, rows, public, encoded, options, private=plan is not None)
    return Prepared(student, task, rows, encoded, options, plan, split, calibrated, canaries)


def _numbered(on_progress: ProgressCallback, stage: str, k: int, count: int) -> ProgressCallback:
    """Progress over all prompts."""

    def tell(progress: Progress) -> None:
        done, steps = k * progress.steps + progress.step, count * progress.steps
        on_progress(Progress(done, steps, stage, progress.metrics))

    return tell


@torch.no_grad()
def confidences(
    model: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    prompts: Tensor,
    options: TuneOptions,
    *,
    stage: str = "scores",
    on_progress: ProgressCallback = ignore,
) -> NDArray[np.float64]:
    """log(p / (1 - p)) of each row's own label behind each prompt: (K, l, d) -> (K, N).

    Carlini et al. (2022) scale confidences so, since the result is close to a Gaussian.

    Raises:
        Cancelled: raised by ``on_progress``.
    """
    words = label_words(model, task)
    batches = list(encode_private(model, task, rows, options).in_order_of_length(BATCH))
    found = torch.zeros(len(prompts), len(rows), dtype=torch.float64)
    for done, batch in enumerate(batches, start=1):
        own = torch.nn.functional.one_hot(batch.labels, len(task.labels)).bool()  # (B, C)
        for k, prompt in enumerate(prompts):
            chosen = model.answer_logits(batch, prompt, tokens=words.token_ids)  # (B, K)
            scores = words.scores(chosen).double().cpu()  # (B, C)
            others = scores.masked_fill(own, -torch.inf).logsumexp(1)
            found[k, list(batch.index)] = scores[own] - others
        on_progress(Progress(done, len(batches), stage))
    return found.numpy()
