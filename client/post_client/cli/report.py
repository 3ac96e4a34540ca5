"""``post report make | show``: what a student can do and what it leaks, beside its target (provider)."""

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

report = typer.Typer(no_args_is_help=True, help="What a student can do and what it leaks, beside its target.")
Folder = Annotated[
    Path | None, typer.Option("--out", help="Folder for report.json, report.md and report.png; by default none.")
]


@report.command()
def make(
    student: Annotated[str, typer.Argument(help="Name or id of the student.")],
    public: Annotated[
        list[str], typer.Option("--public", help="DATASET=TASK, labelled; a preset or a JSON file; repeat for more.")
    ],
    members: Annotated[
        list[str], typer.Option("--members", help="Dataset of text that the models were trained on; repeat for more.")
    ],
    non_members: Annotated[
        list[str], typer.Option("--non-members", help="Dataset of like text that they never saw; repeat for more.")
    ],
    tune_rows: Annotated[int | None, typer.Option(min=2, help="Rows of a task to tune on, at most.")] = None,
    test_rows: Annotated[int | None, typer.Option(min=1, help="Rows of a task held out, at most half of it.")] = None,
    texts: Annotated[int | None, typer.Option(min=1, help="Members, and non-members, to attack, at most.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each tuning.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows in a step of tuning.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of each tuning, at its start; it falls to 0.")] = None,
    num_virtual_tokens: Annotated[int | None, typer.Option(min=1, help="Vectors in a prompt.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens of a text; the rest is cut.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Draws what is held out and the order of the batches.")
    ] = None,
    folder: Folder = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Measure a student and its target on public data, at the provider; wait, and show the report."""
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
    given = {name: value for name, value in options.items() if value is not None}
    tasks = _tasks(public)
    _check(folder)
    with connect(url) as client:
        job = client.reports.create(student=student, tasks=tasks, members=members, non_members=non_members, **given)
        err.print(f"The report will be {job.id}; see it again with: post report show {job.id}")
        follow(job)
        _give(client.reports.get(job.id), folder, json)


@report.command()
def show(
    report: Annotated[str, typer.Argument(help="Id of the report's job.")],
    folder: Folder = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """A finished report."""
    _check(folder)
    with connect(url) as client:
        _give(client.reports.get(report), folder, json)


def _tasks(options: list[str]) -> dict[str, TaskSpec]:
    """``["reviews=sst2"]`` -> the forms by their dataset."""
    found: dict[str, TaskSpec] = {}
    for option in options:
        dataset, equals, name = option.partition("=")
        if not equals or not dataset or not name:
            usage_error(f"--public is DATASET=TASK, such as reviews=sst2; not {option!r}.")
        if dataset in found:
            usage_error(f"--public names the dataset {dataset!r} twice.")
        found[dataset] = task_from(name, None, None).spec()
    return found


def _check(folder: Path | None) -> None:
    if folder is not None:
        check_writable(folder / "report.json")


def _give(found: TradeOffReport, folder: Path | None, json: bool) -> None:
    """To the files, if wanted, and to standard output."""
    from post_client.report_rendering import draw, markdown, sections

    if folder is not None:
        write_file(folder / "report.json", (found.model_dump_json(indent=2) + "\n").encode())
        write_file(folder / "report.md", markdown(found).encode())
        draw(found, folder / "report.png")
    if json:
        print_json(found.model_dump(mode="json"))
        return
    for section in sections(found):
        columns = [Column(escape(name), justify="right" if at else "left") for at, name in enumerate(section.columns)]
        table = Table(*columns, title=escape(section.title), title_justify="left")
        for row in section.rows:
            table.add_row(*map(escape, row))
        print_table(table, out)
        if section.note:
            out.print(escape(section.note))
