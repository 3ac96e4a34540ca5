"""Tune several times with different learning rates and keep the prompt that does best on *public* rows.

Every trial sees the private rows, so the budget is that of all of them together: the noise is chosen so that all trials
spend ε, whichever is kept. Choosing by public rows costs nothing on top; choosing by private ones would, so it isn't
offered.
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
    """``score`` is the mean log-probability of the right label on the public rows; nothing private is in it."""

    learning_rate: float
    score: float


@dataclass(frozen=True)
class SearchResult:
    """The best prompt, with the statement of the whole search, and all trials in the order of their learning rates."""

    best: TuneResult
    trials: tuple[Trial, ...]


def learning_rates(middle: float, trials: int) -> list[float]:
    """``trials`` learning rates around ``middle``, each twice the one before."""
    return [middle * 2.0 ** (at - (trials - 1) / 2) for at in range(trials)]


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

    ``judge`` are public rows with labels of the task. Interrupted and started again, it draws the same numbers.

    Raises:
        InvalidInput: fewer than two trials, or a generation task.
        Others: as :func:`tune`; ``judge`` is checked as private rows are.
    """
    if trials < 2 or task.is_generation:
        raise InvalidInput("a search makes two trials at least, of a task with classes")
    check_rows(task, judge)
    budget = None if privacy is None else replace(privacy, trials=trials)
    shared = None if reserve is None else _Shared(reserve, fingerprint(trials, list(map(asdict, judge))))
    found: list[tuple[Trial, TuneResult]] = []
    for at, rate in enumerate(learning_rates(options.learning_rate, trials)):
        result = tune(
            student,
            task,
            rows,
            options.replace(learning_rate=rate),
            privacy=budget,
            public=public,
            on_progress=_numbered(on_progress, at, trials),
            checkpoint=None if checkpoint is None else checkpoint / f"trial-{at}",
            reserve=None if shared is None else partial(shared, at),
        )
        found.append((Trial(rate, _score(student, task, judge, result, options)), result))
    best = max(found, key=lambda each: each[0].score)[1]
    statement = best.statement
    if statement is not None:  # the judges' texts enter without noise, too
        seen = [*(public or ()), *(row.text for row in judge)]
        statement = replace(statement, also_public=also_public(rows, seen))
    run = None if shared is None else shared.run
    return SearchResult(replace(best, statement=statement, run=run), tuple(trial for trial, _ in found))


@dataclass
class _Shared:
    """One reservation for all trials, made when the first one has passed its checks; each has its own randomness."""

    reserve: Reserve
    search: str
    """Tells searches apart that begin with the same trial."""
    run: Run | None = None

    def __call__(self, at: int, rows: Sequence[Row], charge: Charge, run_id: str) -> Run:
        if self.run is None:
            self.run = self.reserve(rows, charge, fingerprint(run_id, self.search))
        return self.run.trial(at)


def _score(model: LanguageModel, task: Task, judge: Sequence[Row], result: TuneResult, options: TuneOptions) -> float:
    prompt = result.prompt.embeddings.to(model.device)
    chances = classify(model, task, [row.text for row in judge], prompt, max_length=options.max_length)  # (N, C)
    right = torch.tensor([task.labels.index(str(row.label)) for row in judge])
    return float(chances.gather(1, right[:, None]).clamp_min(1e-12).log().mean())


def _numbered(on_progress: ProgressCallback, at: int, trials: int) -> ProgressCallback:
    def tell(progress: Progress) -> None:
        done, steps = at * progress.steps + progress.step, trials * progress.steps
        on_progress(Progress(done, steps, f"trial {at + 1} of {trials}", progress.metrics))

    return tell
