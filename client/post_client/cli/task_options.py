"""A task given on the command line: a preset, a file, or a template with label words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from post_client.console import usage_error

if TYPE_CHECKING:
    from post_shared.data.tasks import Task

TaskName = Annotated[str | None, typer.Option("--task", help="Task preset (sst2, agnews, …) or JSON file.")]
Template = Annotated[
    str | None, typer.Option("--template", help="Instead of --task: a template with {text}, such as '{text}, it was'.")
]
LabelWords = Annotated[
    list[str] | None,
    typer.Option("--label-word", help="With --template: label=word,word, once per label; omit it for generation."),
]


def task_from(name: str | None, template: str | None, label_words: list[str] | None) -> Task:
    """The task that the options describe.

    Raises:
        TaskInvalid: there is no such preset or file, or the task can't be used.
    """
    from post_shared.data.tasks import Task, preset_names

    if (name is None) == (template is None):
        usage_error("Give the task: either --task, or --template with --label-word.")
    if name is not None:
        if label_words:
            usage_error("--label-word can be used with --template only, not with --task.")
        is_file = name.endswith(".json") or "/" in name or (name not in preset_names() and Path(name).is_file())
        return Task.load(name) if is_file else Task.preset(name)
    return Task(str(template), parse_label_words(label_words) if label_words else None)


def parse_label_words(options: list[str]) -> dict[str, tuple[str, ...]]:
    """``["good=great,fine"]`` -> ``{"good": ("great", "fine")}``"""
    label_words: dict[str, tuple[str, ...]] = {}
    for option in options:
        label, equals, words = option.partition("=")
        if not equals or not label.strip():
            usage_error(f"--label-word takes label=word,word; not {option!r}.")
        if label.strip() in label_words:
            usage_error(f"--label-word names the label {label.strip()!r} twice; give all its words in one option.")
        label_words[label.strip()] = tuple(word.strip() for word in words.split(","))
    return label_words
