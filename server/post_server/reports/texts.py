"""The public rows and texts of a trade-off report: checked, and sampled with the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from post_shared.data.rows import Row
from post_shared.data.tasks import Task
from post_shared.errors import DataInvalid
from post_shared.method.tuning.tune import check_rows
from post_shared.model.language_model import LanguageModel
from post_shared.schemas.reports import ReportCreate

MIN_ROWS = 8
"""Distinct texts of a task: fewer give no meaningful result."""
MIN_TEXTS = 20
"""Minimum number of members, and of non-members, of an attack."""
MIN_TOKENS = 8
"""Shorter texts, such as headings, are left out of the attack: their scores are noise."""


@dataclass(frozen=True)
class PublicTask:
    """A labelled public dataset, split into ``tune`` and held-out ``test`` rows."""

    dataset: str
    task: Task
    tune: tuple[Row, ...]
    test: tuple[Row, ...]


def split_task(dataset: str, task: Task, rows: Sequence[Row], request: ReportCreate) -> PublicTask:
    """Shuffle the distinct texts of ``rows`` with the seed; up to half of them are held out.

    Raises:
        DataInvalid: too few texts, rows without labels, labels that the task doesn't have, or only one class.
    """
    distinct = list({_normalised(row.text): row for row in rows}.values())
    if len(distinct) < MIN_ROWS:
        raise DataInvalid(f"the dataset {dataset} has {len(distinct)} different texts; it needs at least {MIN_ROWS}")
    random.Random(f"{request.seed}/{dataset}").shuffle(distinct)  # noqa: S311  public data
    count = min(request.test_rows, len(distinct) // 2)
    tune = distinct[count : count + request.tune_rows]
    try:
        check_rows(task, distinct)
        check_rows(task, tune)
    except DataInvalid as error:
        raise DataInvalid(f"the dataset {dataset}: {error.detail}") from error
    return PublicTask(dataset, task, tuple(tune), tuple(distinct[:count]))


def attacked_texts(
    model: LanguageModel, members: Sequence[str], others: Sequence[str], request: ReportCreate
) -> tuple[list[str], list[str]]:
    """Up to ``request.texts`` distinct, long enough texts of each side, sampled with the seed.

    Raises:
        DataInvalid: a text on both sides, or too few texts.
    """
    shared = {_normalised(text) for text in members} & {_normalised(text) for text in others}
    if shared:
        raise DataInvalid(f"{len(shared)} texts are among both members and non-members; remove them from one side")
    return _sample(model, "members", members, request), _sample(model, "non-members", others, request)


def _sample(model: LanguageModel, side: str, texts: Sequence[str], request: ReportCreate) -> list[str]:
    distinct = list({_normalised(text): text for text in texts}.values())
    random.Random(f"{request.seed}/{side}").shuffle(distinct)  # noqa: S311  public data
    chosen: list[str] = []
    for text in distinct:
        ids = model.tokenizer(text, add_special_tokens=False, truncation=True, max_length=MIN_TOKENS + 1).input_ids
        if len(ids) > MIN_TOKENS:  # a causal model doesn't predict the first token
            chosen.append(text)
        if len(chosen) == request.texts:
            break
    if len(chosen) < MIN_TEXTS:
        raise DataInvalid(
            f"there are {len(chosen)} different {side} of more than {MIN_TOKENS} tokens, fewer than {MIN_TEXTS}"
        )
    return chosen


def _normalised(text: str) -> str:
    """Texts that differ only in case and whitespace are the same text."""
    return " ".join(text.casefold().split())
