"""``post evaluate``: evaluate a model on public data at the provider."""

from __future__ import annotations

from typing import Annotated

import typer

from post_client.cli.task_options import LabelWords, TaskName, Template, task_from
from post_client.console import Url, connect, follow, print_facts
from post_shared.cli.output import AsJson, print_json


def evaluate(
    model: Annotated[str, typer.Option("--model", help="Name or id of a target or student model.")],
    dataset: Annotated[str, typer.Option("--dataset", help="Name or id of a labelled public dataset.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Id of a prompt; without one, give a task.")] = None,
    task: TaskName = None,
    template: Template = None,
    label_word: LabelWords = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Use only the first rows, at most this many.")] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Evaluate a model on public data at the provider. For private data use post predict --data."""
    spec = None if prompt else task_from(task, template, label_word).spec()
    options = {} if max_rows is None else {"max_rows": max_rows}
    with connect(url) as client:
        job = client.evaluations.create(model=model, dataset=dataset, prompt=prompt, task=spec, **options)
        follow(job)
    if json:
        print_json(job.document.model_dump(mode="json"))
    else:
        print_facts(job.result)
