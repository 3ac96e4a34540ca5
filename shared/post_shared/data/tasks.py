"""A task: the template that turns a text into a question to a language model, and the words that answer it.

Classification is text infilling: ``"{text}, it was"`` (a causal model predicts the next token) or
``"{text}, it was {mask}"`` (a masked model fills the mask), with one or more label words per class. A template for one
kind of model is adapted to the other: a ``{mask}`` at the end is dropped or added. A generation task has no label
words; its answers are free text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from post_shared.errors import TaskInvalid
from post_shared.schemas.tasks import TaskSpec
from post_shared.schemas.validation import first_error

TEXT, MASK = "{text}", "{mask}"
MAX_LABELS = 1000


@dataclass(frozen=True)
class Task:
    """A template and, for classification, the label words of each label.

    ``description`` states the task in words; a prompt may start from it. It stays with the data owner: :meth:`spec`
    leaves it out.
    """

    template: str
    label_words: Mapping[str, tuple[str, ...]] | None = None
    description: str = ""

    def __post_init__(self) -> None:
        _check_template(self.template)
        if self.label_words is not None:
            label_words = {label: tuple(dict.fromkeys(words)) for label, words in self.label_words.items()}
            _check_label_words(label_words)
            object.__setattr__(self, "label_words", label_words)

    @property
    def is_generation(self) -> bool:
        return self.label_words is None

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The labels in their fixed order, which is the order of all scores. Empty for generation."""
        return tuple(self.label_words or ())

    def template_for(self, kind: str) -> str:
        """The template for a ``causal`` or ``masked`` model.

        Raises:
            TaskInvalid: a causal model can't fill a mask in the middle, and a masked model can't generate.
        """
        if kind == "masked":
            if self.is_generation:
                raise TaskInvalid("a masked model can't generate; give the task label words or use a causal model")
            return self.template if MASK in self.template else f"{self.template} {MASK}"
        if MASK not in self.template:
            return self.template
        before, after = self.template.split(MASK)
        if after.strip(" ."):
            raise TaskInvalid(
                f"the template {self.template!r} continues after {MASK}; a causal model answers at the end, "
                f"so move {MASK} there or leave it out"
            )
        return before.rstrip()

    # --- conversions ----------------------------------------------------------------------------------

    def spec(self) -> TaskSpec:
        """What crosses the wire: template and label words, nothing else."""
        words = None if self.label_words is None else {name: list(words) for name, words in self.label_words.items()}
        return TaskSpec(template=self.template, label_words=words)

    @classmethod
    def from_spec(cls, spec: TaskSpec) -> Task:
        words = None if spec.label_words is None else {name: tuple(words) for name, words in spec.label_words.items()}
        return cls(template=spec.template, label_words=words)

    @classmethod
    def load(cls, path: str | Path) -> Task:
        """Read a task from a JSON file with ``template`` and, optionally, ``label_words`` and ``description``.

        Raises:
            TaskInvalid: no such file, invalid JSON, unknown or missing members; the message names the file.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TaskInvalid(f"{path}: can't read the task: {error}") from error
        return cls._from_document(document, str(path))

    @classmethod
    def preset(cls, name: str) -> Task:
        """One of the paper's tasks by name; see :func:`preset_names`.

        Raises:
            TaskInvalid: there is no such preset.
        """
        if name not in preset_names():
            raise TaskInvalid(f"there is no preset task {name!r}; the presets are: {', '.join(preset_names())}")
        document = json.loads((files("post_shared.data") / "presets" / f"{name}.json").read_text(encoding="utf-8"))
        return cls._from_document(document, name)

    @classmethod
    def _from_document(cls, document: Any, where: str) -> Task:
        if not isinstance(document, dict):
            raise TaskInvalid(f"{where}: a task is a JSON object with template and label_words")
        description = document.pop("description", "")
        if not isinstance(description, str):
            raise TaskInvalid(f"{where}: description must be a string")
        try:
            task = cls.from_spec(TaskSpec.model_validate(document))
            return cls(task.template, task.label_words, description)
        except ValidationError as error:
            raise TaskInvalid(f"{where}: {first_error(error.errors())}") from error
        except TaskInvalid as error:
            raise TaskInvalid(f"{where}: {error.detail}") from error


def preset_names() -> tuple[str, ...]:
    """The names of the paper's tasks that come with POST."""
    folder = files("post_shared.data") / "presets"
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def _check_template(template: str) -> None:
    if template.count(TEXT) != 1:
        raise TaskInvalid(
            f"the template {template!r} needs exactly one {TEXT} where the text goes; for example '{TEXT}, it was'"
        )
    if template.count(MASK) > 1:
        raise TaskInvalid(f"the template {template!r} has more than one {MASK}")


def _check_label_words(words: Mapping[str, Sequence[str]]) -> None:
    if len(words) < 2:
        raise TaskInvalid(f"a classification task needs at least two labels, not {len(words)}: {list(words)}")
    if len(words) > MAX_LABELS:
        raise TaskInvalid(f"a task has at most {MAX_LABELS} labels, not {len(words)}")
    used_by: dict[str, str] = {}
    for label, candidates in words.items():
        if not label.strip():
            raise TaskInvalid("a label is empty")
        if not candidates or any(not word.strip() for word in candidates):
            raise TaskInvalid(f"label {label!r} needs at least one label word, and none may be empty")
        for word in candidates:
            if used_by.setdefault(word.strip(), label) != label:
                raise TaskInvalid(f"{word!r} is a label word of both {used_by[word.strip()]!r} and {label!r}")
