"""Labelled sets in a folder: ``<name>/train.jsonl`` and ``<name>/test.jsonl`` (``.gz`` too), and a corpus of prose."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from post_shared.data.rows import Row, read_corpus, read_rows
from post_shared.data.tasks import Task, preset_names
from post_shared.errors import DataInvalid, InvalidInput

CORPUS = "corpus.txt"
TASK_FILE = "task.json"
NAMED = "{text} This is about"
"""The template of a task that is known by the names of its labels only."""


@dataclass(frozen=True)
class LabelledSet:
    """``train`` is what an owner tunes on, or whose texts a provider transfers with; ``test`` only measures."""

    name: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]

    @property
    def labels(self) -> set[str]:
        return {str(row.label) for row in self.train + self.test}

    @property
    def texts(self) -> list[str]:
        """The texts of ``train``, without repeats: a public set as the transfer sees it."""
        return list(dict.fromkeys(row.text for row in self.train))


def find(folder: Path, name: str) -> Path | None:
    """``folder/name``, plain or gzipped."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_set(folder: Path, name: str) -> LabelledSet:
    """The set ``name`` under ``folder``.

    Raises:
        DataInvalid: a file is missing or can't be read, or a row has no label.
    """
    parts = []
    for part in ("train", "test"):
        path = find(folder / name, f"{part}.jsonl")
        if path is None:
            if not folder.is_dir():
                raise DataInvalid(f"there is no folder {folder}")
            there = sorted(each.parent.name for each in folder.glob("*/train.jsonl*"))
            raise DataInvalid(f"{folder / name} has no {part}.jsonl; sets there: {', '.join(there) or 'none'}")
        rows = tuple(read_rows(path, format="jsonl"))
        bare = next((at for at, row in enumerate(rows, 1) if row.label is None), None)
        if bare:
            raise DataInvalid(f"{path}: row {bare} has no label; both parts are labelled, as accuracy is measured")
        parts.append(rows)
    return LabelledSet(name, *parts)


def read_prose(folder: Path) -> list[str]:
    """The paragraphs of ``folder/corpus.txt`` (or ``.gz``).

    Raises:
        DataInvalid: there is none.
    """
    path = find(folder, CORPUS)
    if path is None:
        raise DataInvalid(f"{folder} has no {CORPUS} (or {CORPUS}.gz): plain prose, one paragraph a line, to distil on")
    return read_corpus(path, format="txt")


def some_prose(paragraphs: Sequence[str], letters: int) -> list[str]:
    """Paragraphs drawn at random (seed 0) until they have ``letters`` letters, or all of them."""
    order = random.Random(0).sample(range(len(paragraphs)), len(paragraphs))
    until = bisect_left(list(accumulate(len(paragraphs[at]) for at in order)), letters)
    return [paragraphs[at] for at in order[: until + 1]]


def task_of(folder: Path, some: LabelledSet, chosen: Mapping[str, str]) -> Task:
    """The task of a set: what ``chosen`` says (a preset or a file), the set's own task.json, its namesake among the
    presets, the first preset with the same labels, or else the labels' own names as label words.

    Raises:
        TaskInvalid: labels whose names can't be told apart.
    """
    if some.name in chosen:
        value = chosen[some.name]
        return Task.preset(value) if value in preset_names() else Task.load(value)
    own = folder / some.name / TASK_FILE
    if own.is_file():
        return Task.load(own)
    names = sorted(preset_names(), key=lambda preset: preset != some.name)
    for preset in names:
        task = Task.preset(preset)
        if set(task.labels) == some.labels:
            return task
    return Task(NAMED, {label: _words_of(label) for label in sorted(some.labels)})


def _words_of(label: str) -> tuple[str, ...]:
    """A label's name and, where it is made of several, its words.

    >>> _words_of("Sci/Tech")
    ('Sci/Tech', 'Sci', 'Tech')
    """
    return tuple(dict.fromkeys([label, *re.findall(r"[^\W_]+", label)]))


def pairs(private: list[str], public: list[str]) -> list[tuple[str, str]]:
    """Every private set with every public one but itself.

    Raises:
        InvalidInput: nothing is left.
    """
    found = [(mine, theirs) for mine in dict.fromkeys(private) for theirs in dict.fromkeys(public) if mine != theirs]
    if not found:
        raise InvalidInput("a private set needs a public one other than itself")
    return found


def check_apart(private: LabelledSet, public: LabelledSet) -> None:
    """Raise :class:`DataInvalid` when public text holds a private one: what came of it would mean nothing."""
    shared = {row.text for row in private.train + private.test} & set(public.texts)
    if shared:
        raise DataInvalid(
            f"{len(shared)} texts of {private.name} are also in {public.name}; take them out of one of the two"
        )


def templates_of(tasks: Sequence[Task]) -> tuple[str, ...]:
    """For distillation. The provider knows families of tasks, not the owner's task: half of the texts stand in the
    templates of its own sets' tasks, the others in those of the presets."""
    presets = [Task.preset(name) for name in preset_names()]
    every = dict.fromkeys(task.template_for("causal") for task in presets if not task.is_generation)
    own = list(dict.fromkeys(task.template_for("causal") for task in tasks))
    others = [template for template in every if template not in own]
    return tuple(own * max(1, len(others)) + others * len(own))
