"""``post predict``: predictions of the target model, scored on this machine."""

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
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Id of a target prompt; without one, give a task.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; repeat for several texts.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="JSONL, CSV, TSV or Parquet file with a text column.")
    ] = None,
    task: TaskName = None,
    template: Template = None,
    label_word: LabelWords = None,
    output: Annotated[Path | None, typer.Option("--out", help="Write JSON Lines to this file, not to stdout.")] = None,
    text_column: Annotated[str, typer.Option(help="Name of the text column.")] = "text",
    label_column: Annotated[
        str | None,
        typer.Option(help="Column with labels, which never leave this machine; default: label, if it exists."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=256, help="Maximum tokens per answer; generation tasks only.")
    ] = 16,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Predict with the target model. The provider sees the texts; labels stay on this machine, for the accuracy."""
    if bool(text) == (data is not None):
        usage_error("Give either --text or --data.")
    if prompt is not None and (task or template or label_word):
        usage_error("A prompt has its own task: give either --prompt or a task.")
    spec = None if prompt else task_from(task, template, label_word).spec()
    rows = _rows(text, data, text_column, label_column)
    if output is not None:
        check_writable(output)
    with connect(url) as client:
        _check_labels(rows, spec or _task_of_prompt(client, str(prompt)))
        with bar(f"predict {model}") as show:
            predictions = client.predictions.create(
                model=model,
                prompt=prompt,
                task=spec,
                texts=[row.text for row in rows],
                max_new_tokens=max_new_tokens,
                texts_per_request=32,
                progress=lambda done, count: show(done, count, f"{done} of {count}"),
            )
    _print(rows, predictions, output, json)


def _rows(text: list[str] | None, data: Path | None, text_column: str, label_column: str | None) -> list[Row]:
    from post_shared.data.rows import Row, read_rows

    if data is None:
        return [Row(single, None) for single in text or []]
    rows = read_rows(data, text_column=text_column, label_column=label_column or "label")
    if label_column is not None and all(row.label is None for row in rows):
        raise DataInvalid(f"{data.name} has no labels in column {label_column!r}. Nothing was sent")
    return rows


def _task_of_prompt(client: Client, prompt: str) -> TaskSpec:
    """The task of a prompt. Warns if the prompt was never transferred."""
    document = client.prompts.get(prompt)
    if document.role == PromptRole.SOURCE:
        err.print(
            f"{document.id} is a source prompt, tuned on a student: it is used without a transfer (direct reuse)."
        )
    return document.task


def _check_labels(rows: Sequence[Row], spec: TaskSpec) -> None:
    """Refuse, before any text is sent, labels that the task doesn't have: they could never be predicted.

    Raises:
        DataInvalid: there are such labels.
    """
    known = spec.label_words
    unknown = sorted({row.label for row in rows if row.label is not None} - set(known or ())) if known else []
    if unknown:
        raise DataInvalid(
            f"the data has labels that the task doesn't have: {', '.join(unknown[:5])}; the task's labels are: "
            f"{', '.join(known or ())}. Nothing was sent"
        )


def score_locally(rows: Sequence[Row], predictions: Sequence[Prediction]) -> float | None:
    """Accuracy (for generation: exact match, ignoring case); None unless every row has a label."""
    if any(row.label is None for row in rows):
        return None
    pairs = [(row.label or "", p.label, p.text or "") for row, p in zip(rows, predictions, strict=True)]
    correct = [
        label == predicted if predicted is not None else label.strip().casefold() == answer.strip().casefold()
        for label, predicted, answer in pairs
    ]
    return sum(correct) / len(correct)


def _print(rows: Sequence[Row], predictions: Sequence[Prediction], output: Path | None, json: bool) -> None:
    items = [_item(row, prediction) for row, prediction in zip(rows, predictions, strict=True)]
    accuracy = score_locally(rows, predictions)
    lines = [json_module.dumps(item, ensure_ascii=False) for item in items]
    if output is not None:
        write_file(output, ("\n".join(lines) + "\n").encode())
    elif not json:
        for line in lines:
            typer.echo(line)
    if json:
        print_json({"accuracy": accuracy, "rows": len(items)} | ({} if output else {"items": items}))
    elif accuracy is not None:
        err.print(f"accuracy {accuracy:.4f} on {len(items)} rows (computed locally; the labels were not sent)")


def _item(row: Row, prediction: Prediction) -> dict[str, Any]:
    """One line of the output: the text with a label and scores or, for generation, with an answer."""
    if prediction.label is None:
        return {"text": row.text, "answer": prediction.text}
    return {"text": row.text, "label": prediction.label, "scores": prediction.scores}
