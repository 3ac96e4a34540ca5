"""``post distil`` and ``post evaluate``: jobs at the provider, started over HTTP."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from post_client.cli.console import Url, connect, follow, out, print_facts, usage_error
from post_client.cli.task_options import LabelWords, TaskName, Template, task_from
from post_shared.terminal import AsJson, print_json


def distil(
    target: Annotated[str, typer.Option("--target", help="Name or id of the target model.")],
    corpus: Annotated[list[str], typer.Option("--corpus", help="Name or id of a public dataset; repeat for more.")],
    name: Annotated[str, typer.Option("--name", help="Name of the student to be.")],
    keep_layers: Annotated[
        str | None, typer.Option(help="How many layers to keep (8 unless said), or which: 0,1,28,29.")
    ] = None,
    layer_pattern: Annotated[
        str | None, typer.Option(help="How a number of layers is spread: ends, even, front, or search for the best.")
    ] = None,
    start: Annotated[str | None, typer.Option(help="fold (closed form) or copy.")] = None,
    answer_form: Annotated[
        list[str] | None,
        typer.Option(
            "--answer-form", help="Put short paragraphs into this form, as '{text}, it was'; repeat for more."
        ),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    plateau: Annotated[bool, typer.Option(help="Stop when the loss no longer falls.")] = False,
    freeze_head: Annotated[
        bool | None,
        typer.Option(
            "--freeze-head/--train-head", help="Whether the head stays as the target has it; it does unless said."
        ),
    ] = None,
    freeze_embeddings: Annotated[
        bool | None,
        typer.Option(
            "--freeze-embeddings/--train-embeddings",
            help="Whether the embeddings stay as the target has them; they do unless said.",
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its highest, after the warm-up.")] = None,
    alignment: Annotated[float | None, typer.Option(min=0, help="Weight of the hidden states inside.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=32, help="Tokens of text in a step.")] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Take a batch in so many parts; default: as few as fit the memory.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(min=8, help="Tokens in one piece of text.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Order of the text.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until it is done.")] = True,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Distil a target model into a student (provider). Prints the student's id."""
    if minutes is None and steps is None:
        usage_error("Say how long to distil: --minutes, --steps or both.")
    options: dict[str, Any] = {
        "keep_layers": None if keep_layers is None else _layers(keep_layers),
        "layer_pattern": layer_pattern,
        "start": start,
        "answer_forms": answer_form or None,
        "minutes": minutes,
        "steps": steps,
        "plateau": plateau or None,
        "freeze_head": freeze_head,
        "freeze_embeddings": freeze_embeddings,
        "learning_rate": learning_rate,
        "alignment": alignment,
        "batch_tokens": batch_tokens,
        "accumulate": accumulate,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    given = {key: value for key, value in options.items() if value is not None}
    with connect(url) as client:
        job = client.distillations.create(target=target, name=name, corpus=corpus, **given)
        if wait:
            follow(job)
    if json:
        print_json(job.document.model_dump(mode="json"))
    else:
        out.print(job.result["model_id"] if wait else job.id)


def _layers(text: str) -> list[int] | int:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        usage_error(f"--keep-layers is a number, or layer numbers such as 0,1,28,29; not {text!r}.")
    return found if "," in text else found[0]


def evaluate(
    model: Annotated[str, typer.Option("--model", help="Name or id of a target or student model.")],
    dataset: Annotated[str, typer.Option("--dataset", help="Name or id of a labelled public dataset.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Id of a prompt; without one, give a task.")] = None,
    task: TaskName = None,
    template: Template = None,
    label_word: LabelWords = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Rows to use at most, from the first on.")] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Measure a model on public data, at the provider. For private data use post predict --data."""
    form = None if prompt else task_from(task, template, label_word).form()
    options = {} if max_rows is None else {"max_rows": max_rows}
    with connect(url) as client:
        job = client.evaluations.create(model=model, dataset=dataset, prompt=prompt, task=form, **options)
        follow(job)
    if json:
        print_json(job.document.model_dump(mode="json"))
    else:
        print_facts(job.result)
