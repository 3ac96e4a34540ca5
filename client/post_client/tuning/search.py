"""Tune with several learning rates and keep the prompt that does best on *public* rows.

Every trial uses the private rows, so the trials share the budget: the noise is chosen so that all of them together
spend ε. Choosing by public rows costs nothing more. Choosing by private rows would, so it isn't offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from post_client.ledger import Charge, Reserve, Run
from post_client.privacy import PrivacyConfig
from post_client.privacy.statement import also_public
from post_client.tuning.tune import TuneResult, check_rows, tune
from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import InvalidInput
from post_shared.inference.evaluation import classify
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.tuning import TuneOptions
from post_shared.training.checkpoint import fingerprint
from post_shared.training.progress import Progress, ProgressCallback, ignore


@dataclass(frozen=True)
class Trial:
    """``score`` is the mean log-probability of the correct label on the public rows."""

    learning_rate: float
    score: float


@dataclass(frozen=True)
class SearchResult:
    """The best prompt, with the statement of the whole search, and all trials by ascending learning rate."""

    best: TuneResult
    trials: tuple[Trial, ...]


def learning_rates(middle: float, trials: int) -> list[float]:
    """``trials`` learning rates around ``middle``, each twice the previous one."""
    return [middle * 2.0 ** (trial - (trials - 1) / 2) for trial in range(trials)]


def search(
    student: LanguageModel,
    task: Task,
    rows: Sequence[Row],
    options: TuneOptions,
    *,
    trials: int,
    judge: Sequence[Row],
    privacy: PrivacyConfig | None,
    public: Sequence[str] | None = None,
    on_progress: ProgressCallback = ignore,
    checkpoint: Path | None = None,
    reserve: Reserve | None = None,
) -> SearchResult:
    """:func:`post_client.tuning.tune`, ``trials`` times under one budget and one reservation.

    ``judge``: public rows with labels of the task. A restarted search draws the same random numbers.

    Raises:
        InvalidInput: fewer than two trials, or a generation task.
        Others: as :func:`tune`; ``judge`` is checked like private rows.
    """
    if trials < 2 or task.is_generation:
        raise InvalidInput("a search needs at least two trials and a classification task")
    check_rows(task, judge)
    budget = None if privacy is None else replace(privacy, trials=trials)
    shared = None if reserve is None else _SharedReservation(reserve, fingerprint(trials, list(map(asdict, judge))))
    results: list[tuple[Trial, TuneResult]] = []
    for number, rate in enumerate(learning_rates(options.learning_rate, trials)):
        result = tune(
            student,
            task,
            rows,
            options.replace(learning_rate=rate),
            privacy=budget,
            public=public,
            on_progress=_trial_progress(on_progress, number, trials),
            checkpoint=None if checkpoint is None else checkpoint / f"trial-{number}",
            reserve=None if shared is None else partial(shared, number),
        )
        results.append((Trial(rate, _score(student, task, judge, result, options)), result))
    best = max(results, key=lambda item: item[0].score)[1]
    statement = best.statement
    if statement is not None:  # the texts of these rows are used without noise, too
        public_texts = [*(public or ()), *(row.text for row in judge)]
        statement = replace(statement, also_public=also_public(rows, public_texts))
    run = None if shared is None else shared.run
    return SearchResult(replace(best, statement=statement, run=run), tuple(trial for trial, _ in results))


@dataclass
class _SharedReservation:
    """One reservation for all trials, made once the first one has passed its checks. Each has its own randomness."""

    reserve: Reserve
    search: str
    """Distinguishes searches that begin with the same trial."""
    run: Run | None = None

    def __call__(self, number: int, rows: Sequence[Row], charge: Charge, run_id: str) -> Run:
        if self.run is None:
            self.run = self.reserve(rows, charge, fingerprint(run_id, self.search))
        return self.run.trial(number)


def _score(model: LanguageModel, task: Task, rows: Sequence[Row], result: TuneResult, options: TuneOptions) -> float:
    """Mean log-probability of the correct label."""
    prompt = result.prompt.embeddings.to(model.device)
    texts = [row.text for row in rows]
    probabilities = classify(model, task, texts, prompt, max_length=options.max_length)  # (N, C)
    correct = torch.tensor([task.labels.index(str(row.label)) for row in rows])  # (N,)
    return float(probabilities.gather(1, correct[:, None]).clamp_min(1e-12).log().mean())


def _trial_progress(on_progress: ProgressCallback, number: int, trials: int) -> ProgressCallback:
    """Progress over all trials."""

    def report(progress: Progress) -> None:
        done, steps = number * progress.steps + progress.step, trials * progress.steps
        on_progress(Progress(done, steps, f"trial {number + 1} of {trials}", progress.metrics))

    return report
