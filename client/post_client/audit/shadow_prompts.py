"""Shadow prompts: the prompts that ``tune`` makes from other subsets of the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from post_client.privacy import Canaries, PrivacyConfig, PrivacyPlan
from post_client.students.checks import check_keeps_no_state, check_tokenizer
from post_client.tuning.tune import Prepared, check_rows, encode_private, run_id_of, starting_prompt, train
from post_shared.data.batches import EncodedRows
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput
from post_shared.method.audit.lira import Members
from post_shared.method.tuning.tune import plan_tuning
from post_shared.model.language_model import LanguageModel
from post_shared.model.verbalizer import label_words
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.checkpoint import Checkpoint, fingerprint
from post_shared.training.progress import Progress, ProgressCallback, ignore

BATCH = 16
"""Rows per forward pass when confidences are computed."""
CanariesOf = Callable[[int], Canaries | None]
"""The gradient canaries of prompt k, if it has any."""


@dataclass(frozen=True)
class Shadows:
    """Prompts (K, l, d), the rows that each was tuned on (K, N), and the plan of private runs."""

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
    """Tune one prompt per row of ``members``. Prompt k is what ``tune`` makes of these rows with seed + k.

    Args:
        members: (K, N), the rows that each prompt is tuned on.
        nominal: the number of rows from which private runs derive sampling rate and δ; by default the size of the
            first subset. Set it if the subsets differ in size, so that the settings don't reveal the size.
        canaries: gradients added to the private steps of prompt k.
        checkpoint: a folder to resume from. It contains prompts tuned on private rows and stays on this machine.

    Raises:
        InvalidInput: a generation task.
        DataInvalid, TaskInvalid, ModelUnsafe, PrivacyInvalid, Cancelled: as ``tune``.
    """
    if task.is_generation:
        raise InvalidInput("an audit scores classes; a generation task has none")
    if options.average_iterates:
        raise InvalidInput("an audit uses the last iterate of each prompt; turn average_iterates off")
    check_rows(task, rows)
    check_tokenizer(student)
    if privacy is not None:
        check_keeps_no_state(student, starting_prompt(student, task, options).embeddings, options.max_length)
    count = nominal or int(members[0].sum())
    encoded = encode_private(student, task, rows, options)
    run_id = "" if checkpoint is None else run_id_of(student, task, rows, options, privacy, public, encoded)
    plan: PrivacyPlan | None = None
    prompts: list[Tensor] = []
    for k, included in enumerate(members):
        indices = np.flatnonzero(included).tolist()
        subset = [rows[index] for index in indices], EncodedRows(tuple(encoded.rows[index] for index in indices))
        plan = (
            None
            if privacy is None
            else PrivacyPlan.make(_seeded(privacy, k), count, batch_size=options.batch_size, steps=options.steps)
        )
        prepared = _prepare(student, task, *subset, options.replace(seed=options.seed + k), plan, public, canaries(k))
        saved_state = None
        if checkpoint is not None:
            name = fingerprint(run_id, included.tolist(), k, nominal, prepared.canaries is not None)
            saved_state = Checkpoint(checkpoint / str(k), name, checkpoint_seconds, keeps_end=True)
        prompt_progress = _shadow_progress(on_progress, stage, k, len(members))
        prompts.append(train(prepared, on_progress=prompt_progress, checkpoint=saved_state).embeddings)
    return Shadows(torch.stack(prompts).to(student.device), members, plan)


def _seeded(privacy: PrivacyConfig, k: int) -> PrivacyConfig:
    """Give each prompt its own noise and batches, even when a test has fixed the seed."""
    return privacy if privacy.seed is None else replace(privacy, seed=privacy.seed + k)


def _prepare(
    student: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    encoded: EncodedRows,
    options: TuneOptions,
    plan: PrivacyPlan | None,
    public: Sequence[str] | None,
    canaries: Canaries | None,
) -> Prepared:
    split, calibrated = plan_tuning(student, task, rows, public, encoded, options, private=plan is not None)
    return Prepared(student, task, rows, encoded, options, plan, split, calibrated, canaries)


def _shadow_progress(on_progress: ProgressCallback, stage: str, k: int, count: int) -> ProgressCallback:
    """Progress over all prompts."""

    def report(progress: Progress) -> None:
        done, steps = k * progress.steps + progress.step, count * progress.steps
        on_progress(Progress(done, steps, stage, progress.metrics))

    return report


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
    """log(p / (1 - p)) of each row's own label with each prompt: (K, l, d) -> (K, N).

    Carlini et al. (2022) use this scaling because the result is close to a Gaussian.

    Raises:
        Cancelled: raised by ``on_progress``.
    """
    words = label_words(model, task)
    batches = list(encode_private(model, task, rows, options).in_order_of_length(BATCH))
    logits_of_labels = torch.zeros(len(prompts), len(rows), dtype=torch.float64)
    for done, batch in enumerate(batches, start=1):
        own = torch.nn.functional.one_hot(batch.labels, len(task.labels)).bool()  # (B, C)
        for k, prompt in enumerate(prompts):
            word_logits = model.answer_logits(batch, prompt, tokens=words.token_ids)  # (B, W)
            scores = words.scores(word_logits).double().cpu()  # (B, C)
            others = scores.masked_fill(own, -torch.inf).logsumexp(1)
            logits_of_labels[k, list(batch.index)] = scores[own] - others
        on_progress(Progress(done, len(batches), stage))
    return logits_of_labels.numpy()
