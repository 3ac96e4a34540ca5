"""The figures of a trade-off report, from measurements on both models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from post_server.reports.texts import PublicTask
from post_shared.method.audit.min_k import HEAD_POSITIONS, SCORES, SHARES, token_rows
from post_shared.method.audit.roc import FALSE_POSITIVE_RATE, Numbers, bootstrap, curve_of
from post_shared.method.losses import cosine_loss, language_model_loss, softened_cross_entropy
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.reports import Attack, Leakage, TaskFigures
from post_shared.training.progress import Progress, ProgressCallback, ignore

CONDITIONS = ("target_zero_shot", "target_calibrated", "target_tuned", "student_zero_shot", "student_tuned")


def task_figures(task: PublicTask, right: Mapping[str, Sequence[bool]], seed: int) -> TaskFigures:
    """Accuracies and their gaps. ``right`` tells per condition whether each held-out row was classified correctly."""
    columns = np.array([right[name] for name in CONDITIONS], dtype=np.float64).T  # (rows, 5)

    def statistic(sample: Numbers) -> Numbers:
        zero_shot, calibrated, tuned, _, student = means = sample.mean(0)
        return np.array([*means, tuned - student, zero_shot - student, calibrated - student])

    estimates = bootstrap(statistic, columns, seed=seed)
    counts = Counter(row.label for row in task.test)
    return TaskFigures(
        dataset=task.dataset,
        tune_rows=len(task.tune),
        test_rows=len(task.test),
        majority=max(counts.values()) / len(task.test),
        **dict(zip((*CONDITIONS, "gap", "gap_zero_shot", "gap_calibrated"), estimates, strict=True)),
    )


def leakage_figures(target: Numbers, student: Numbers, members: int, seed: int) -> tuple[Leakage, ...]:
    """How well both models' scores (texts, scores, shares) separate the first ``members`` texts from the rest."""
    return tuple(
        _leakage(name, share, np.stack([target[:, row, column], student[:, row, column]], 1), members, seed)
        for row, name in enumerate(SCORES)
        for column, share in enumerate(SHARES)
    )


def _leakage(name: str, share: float, scores: Numbers, members: int, seed: int) -> Leakage:
    """``scores`` (texts, 2): target, student."""

    def statistic(seen: Numbers, unseen: Numbers) -> list[float]:
        target, student = map(curve_of, seen.T, unseen.T)
        rates = (curve.at(FALSE_POSITIVE_RATE) for curve in (target, student))
        return [target.auc, student.auc, *rates, target.auc - student.auc]

    estimates = bootstrap(statistic, scores[:members], scores[members:], seed=seed)
    target_auc, student_auc, target_tpr, student_tpr, drop = estimates
    return Leakage(
        score=name,
        share=share,
        target=Attack(auc=target_auc, tpr=target_tpr),
        student=Attack(auc=student_auc, tpr=student_tpr),
        auc_drop=drop,
    )


@torch.no_grad()
def measured_loss(
    target: LanguageModel,
    student: LanguageModel,
    texts: Sequence[str],
    max_length: int,
    *,
    batch_size: int = 16,
    on_progress: ProgressCallback = ignore,
) -> dict[str, float]:
    """The terms of Eq. 1 as means over all tokens of ``texts``, and the number of tokens."""
    rows = token_rows(target, texts, max_length)
    batches = list(rows.encoded.in_order_of_length(batch_size))
    sums = torch.zeros(3, dtype=torch.float64)
    for step, batch in enumerate(batches, 1):
        parts = zip(
            torch.split(target.answer_hidden(batch), HEAD_POSITIONS),  # (P, d)
            torch.split(student.answer_hidden(batch), HEAD_POSITIONS),
            torch.split(batch.tokens.to(target.device), HEAD_POSITIONS),
            strict=True,
        )
        for target_hidden, student_hidden, tokens in parts:
            logits = student.head(student_hidden)  # (P, V)
            losses = (
                softened_cross_entropy(target.head(target_hidden), logits),
                language_model_loss(logits, tokens),
                cosine_loss(target_hidden, student_hidden),
            )
            sums += torch.stack([loss.double().sum() for loss in losses]).cpu()
        on_progress(Progress(step, len(batches), "loss"))
    count = sum(rows.counts)
    return {**dict(zip(("ce", "lm", "cos"), (sums / count).tolist(), strict=True)), "tokens": count}
