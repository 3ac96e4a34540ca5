"""The public rows and texts of a trade-off report: split, drawn by the seed, checked."""

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

LEAST_ROWS = 8
"""Different texts in a task: fewer tell nothing."""
LEAST_TEXTS = 20
"""Members, and non-members, of an attack."""
LEAST_TOKENS = 8
"""Shorter texts, such as headings, are left out of the attack: their scores are noise."""


@dataclass(frozen=True)
class PublicTask:
    """One labelled public dataset, split: ``test`` is never tuned on."""

    dataset: str
    task: Task
    tune: tuple[Row, ...]
    test: tuple[Row, ...]


def split_task(dataset: str, task: Task, rows: Sequence[Row], request: ReportCreate) -> PublicTask:
    """Shuffle the different texts of ``rows`` by the seed; up to half of them are held out.

    Raises:
        DataInvalid: too few texts, rows without labels, labels that aren't the task's, or one class only.
    """
    distinct = list({_plain(row.text): row for row in rows}.values())
    if len(distinct) < LEAST_ROWS:
        raise DataInvalid(f"the dataset {dataset} has {len(distinct)} different texts; {LEAST_ROWS} are the least")
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
    """The different texts of each side that are long enough, at most ``request.texts`` of them, drawn by the seed.

    Raises:
        DataInvalid: a text on both sides, or too few texts.
    """
    shared = {_plain(text) for text in members} & {_plain(text) for text in others}
    if shared:
        raise DataInvalid(
            f"{len(shared)} texts are among both members and non-members; a text was either trained on or not: "
            "take them out of one side"
        )
    return _drawn(model, "members", members, request), _drawn(model, "non-members", others, request)


def _drawn(model: LanguageModel, side: str, texts: Sequence[str], request: ReportCreate) -> list[str]:
    distinct = list({_plain(text): text for text in texts}.values())
    random.Random(f"{request.seed}/{side}").shuffle(distinct)  # noqa: S311  public data
    chosen: list[str] = []
    for text in distinct:
        ids = model.tokenizer(text, add_special_tokens=False, truncation=True, max_length=LEAST_TOKENS + 1).input_ids
        if len(ids) > LEAST_TOKENS:  # a causal model predicts all but the first
            chosen.append(text)
        if len(chosen) == request.texts:
            break
    if len(chosen) < LEAST_TEXTS:
        raise DataInvalid(
            f"there are {len(chosen)} different {side} of more than {LEAST_TOKENS} tokens; {LEAST_TEXTS} are the least"
        )
    return chosen


def _plain(text: str) -> str:
    """By which a text is known again: letter case and space aside."""
    return " ".join(text.casefold().split())
