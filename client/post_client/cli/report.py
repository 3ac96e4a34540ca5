"""``post report make | show``: accuracy and leakage of a student, compared with its target (provider)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from post_client.cli.task_options import task_from
from post_client.console import Url, check_writable, connect, err, follow, out, usage_error, write_file
from post_shared.cli.output import AsJson, print_json, print_table

if TYPE_CHECKING:
    from post_shared.schemas.reports import TradeOffReport
    from post_shared.schemas.tasks import TaskSpec

report = typer.Typer(no_args_is_help=True, help="Accuracy and leakage of a student, compared with its target.")
Folder = Annotated[
    Path | None, typer.Option("--out", help="Folder for report.json, report.md and report.png; default: no files.")
]


@report.command()
def make(
    student: Annotated[str, typer.Argument(help="Name or id of the student.")],
    public: Annotated[
        list[str],
        typer.Option("--public", help="DATASET=TASK: a labelled dataset and a preset or JSON file; repeatable."),
    ],
    members: Annotated[
        list[str], typer.Option("--members", help="Dataset of text that the models were trained on; repeatable.")
    ],
    non_members: Annotated[
        list[str], typer.Option("--non-members", help="Dataset of similar text not trained on; repeatable.")
    ],
    tune_rows: Annotated[int | None, typer.Option(min=2, help="Maximum rows per task to tune on.")] = None,
    test_rows: Annotated[
        int | None, typer.Option(min=1, help="Maximum held-out rows per task; never more than half.")
    ] = None,
    texts: Annotated[int | None, typer.Option(min=1, help="Maximum members, and non-members, to attack.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps per tuning run.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows per tuning step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Initial learning rate of each tuning run; decays to 0.")
    ] = None,
    num_virtual_tokens: Annotated[int | None, typer.Option(min=1, help="Vectors in a prompt.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Longest text in tokens; the rest is cut.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed for the held-out rows and the batch order.")] = None,
    folder: Folder = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Compare a student with its target on public data at the provider, wait, and show the report."""
    tuning: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "num_virtual_tokens": num_virtual_tokens,
        "max_length": max_length,
        "seed": seed,
    }
    options: dict[str, Any] = {
        "tune_rows": tune_rows,
        "test_rows": test_rows,
        "texts": texts,
        "tuning": {name: value for name, value in tuning.items() if value is not None} or None,
        "seed": seed,
    }
    options = {name: value for name, value in options.items() if value is not None}
    tasks = _tasks(public)
    _check_folder(folder)
    with connect(url) as client:
        job = client.reports.create(student=student, tasks=tasks, members=members, non_members=non_members, **options)
        err.print(f"The report's id is {job.id}. To show it again: post report show {job.id}")
        follow(job)
        _output(client.reports.get(job.id), folder, json)


@report.command()
def show(
    report: Annotated[str, typer.Argument(help="Id of the report's job.")],
    folder: Folder = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Show a finished report."""
    _check_folder(folder)
    with connect(url) as client:
        _output(client.reports.get(report), folder, json)


def _tasks(options: list[str]) -> dict[str, TaskSpec]:
    """``["reviews=sst2"]`` -> the tasks by dataset."""
    tasks: dict[str, TaskSpec] = {}
    for option in options:
        dataset, equals, name = option.partition("=")
        if not equals or not dataset or not name:
            usage_error(f"--public takes DATASET=TASK, such as reviews=sst2; not {option!r}.")
        if dataset in tasks:
            usage_error(f"--public names the dataset {dataset!r} twice.")
        tasks[dataset] = task_from(name, None, None).spec()
    return tasks


def _check_folder(folder: Path | None) -> None:
    if folder is not None:
        check_writable(folder / "report.json")


def _output(document: TradeOffReport, folder: Path | None, json: bool) -> None:
    """Write the report's files, if ``folder`` is given, and print the report."""
    from post_client.report_rendering import draw, markdown, sections

    if folder is not None:
        write_file(folder / "report.json", (document.model_dump_json(indent=2) + "\n").encode())
        write_file(folder / "report.md", markdown(document).encode())
        draw(document, folder / "report.png")
    if json:
        print_json(document.model_dump(mode="json"))
        return
    for section in sections(document):
        columns = [Column(escape(name), justify="right" if i else "left") for i, name in enumerate(section.columns)]
        table = Table(*columns, title=escape(section.title), title_justify="left")
        for row in section.rows:
            table.add_row(*map(escape, row))
        print_table(table, out)
        if section.note:
            out.print(escape(section.note))
