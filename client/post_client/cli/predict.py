"""``post predict``"""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from post_client.cli.task_options import LabelWords, TaskName, Template, task_from
from post_client.console import Url, bar, check_writable, connect, err, usage_error, write_file
from post_shared.cli.output import AsJson, print_json
from post_shared.errors import DataInvalid
from post_shared.schemas.prompts import PromptRole

if TYPE_CHECKING:
    from post_client.client import Client
    from post_shared.data.rows import Row
    from post_shared.schemas.predictions import Prediction
    from post_shared.schemas.tasks import TaskSpec


def predict(
    model: Annotated[str, typer.Option("--model", help="Name or id of the target model.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Id of a target prompt; else give a task.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; repeat for more.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="JSONL, CSV or Parquet with a text column.")] = None,
    task: TaskName = None,
    template: Template = None,
    label_word: LabelWords = None,
    to: Annotated[Path | None, typer.Option("--out", help="Write JSON Lines here instead of to stdout.")] = None,
    text_column: Annotated[str, typer.Option(help="Name of the text column.")] = "text",
    label_column: Annotated[
        str | None, typer.Option(help="Its labels are compared here; they never leave. By default label, if there.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=256, help="Generation tasks only.")] = 16,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Ask the target model. The provider sees the texts; labels in the file stay here and give the accuracy."""
    if bool(text) == (data is not None):
        usage_error("Say what to ask: either --text or --data.")
    if prompt is not None and (task or template or label_word):
        usage_error("A prompt brings its own task: give either --prompt or a task.")
    form = None if prompt else task_from(task, template, label_word).spec()
    rows = _rows(text, data, text_column, label_column)
    if to is not None:
        check_writable(to)
    with connect(url) as client:
        _check_labels(rows, form or _form_of(client, str(prompt)))
        with bar(f"predict {model}") as show:
            found = client.predictions.create(
                model=model,
                prompt=prompt,
                task=form,
                texts=[row.text for row in rows],
                max_new_tokens=max_new_tokens,
                texts_per_request=32,
                progress=lambda done, count: show(done, count, f"{done} of {count}"),
            )
    _print(rows, found, to, json)


def _rows(text: list[str] | None, data: Path | None, text_column: str, label_column: str | None) -> list[Row]:
    from post_shared.data.rows import Row, read_rows

    if data is None:
        return [Row(each, None) for each in text or []]
    rows = read_rows(data, text_column=text_column, label_column=label_column or "label")
    if label_column is not None and all(row.label is None for row in rows):
        raise DataInvalid(f"{data.name} has no labels in a column {label_column!r}. Nothing was sent")
    return rows


def _form_of(client: Client, prompt: str) -> TaskSpec:
    """The task of a prompt; says so if it was never transferred."""
    found = client.prompts.get(prompt)
    if found.role == PromptRole.SOURCE:
        err.print(f"{found.id} is a source prompt, tuned on a student: it is put on the model without a transfer.")
    return found.task


def _check_labels(rows: Sequence[Row], spec: TaskSpec) -> None:
    """Before any text leaves: labels that the task doesn't have could never be right."""
    known = spec.label_words
    unknown = sorted({row.label for row in rows if row.label is not None} - set(known or ())) if known else []
    if unknown:
        raise DataInvalid(
            f"the data has labels that the task doesn't: {', '.join(unknown[:5])}; the task's labels are: "
            f"{', '.join(known or ())}. Nothing was sent"
        )


def score_locally(rows: Sequence[Row], found: Sequence[Prediction]) -> float | None:
    """Share of right answers (exact match for free answers); None unless every row has a label."""
    if any(row.label is None for row in rows):
        return None
    pairs = [(row.label or "", guess.label, guess.text or "") for row, guess in zip(rows, found, strict=True)]
    right = [
        label == guess if guess is not None else label.strip().casefold() == answer.strip().casefold()
        for label, guess, answer in pairs
    ]
    return sum(right) / len(right)


def _print(rows: Sequence[Row], found: Sequence[Prediction], to: Path | None, json: bool) -> None:
    items = [_item(row, guess) for row, guess in zip(rows, found, strict=True)]
    accuracy = score_locally(rows, found)
    lines = [json_module.dumps(item, ensure_ascii=False) for item in items]
    if to is not None:
        write_file(to, ("\n".join(lines) + "\n").encode())
    elif not json:
        for line in lines:
            typer.echo(line)
    if json:
        print_json({"accuracy": accuracy, "rows": len(items)} | ({} if to else {"items": items}))
    elif accuracy is not None:
        err.print(f"accuracy {accuracy:.4f} on {len(items)} rows (computed here; the labels never left)")


def _item(row: Row, guess: Prediction) -> dict[str, Any]:
    """One line of the output; ``text`` is the question, ``answer`` a free answer."""
    if guess.label is None:
        return {"text": row.text, "answer": guess.text}
    return {"text": row.text, "label": guess.label, "scores": guess.scores}
