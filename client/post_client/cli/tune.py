"""``post tune``"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from post_client.cli.ledger import LedgerPath, UserColumn, open_ledger
from post_client.cli.private_inputs import DEFAULT_EPSILON, check_outside, privacy_config, public_rows
from post_client.cli.task_options import LabelWords, TaskName, Template, task_from
from post_client.cli.tune_report import NO_GUARANTEE, report_result
from post_client.console import (
    check_new,
    check_writable,
    err,
    naming,
    quiet_libraries,
    usage_error,
    watched,
    write_file,
)
from post_shared.cli.output import AsJson
from post_shared.schemas.tuning import PLAIN, PRIVATE

if TYPE_CHECKING:
    from post_client.ledger import Ledger, Reserve
    from post_client.privacy import PrivacyConfig
    from post_client.tuning.search import Trial
    from post_client.tuning.tune import TuneResult
    from post_shared.data.rows import Row
    from post_shared.data.tasks import Task
    from post_shared.model.language_model import LanguageModel
    from post_shared.schemas.tuning import TuneOptions
    from post_shared.training.progress import ProgressCallback


def tune(
    student: Annotated[Path, typer.Option("--student", help="Folder of the student model (post pull).")],
    data: Annotated[Path, typer.Option("--data", help="Private rows: JSONL, CSV, TSV or Parquet. They stay here.")],
    to: Annotated[Path, typer.Option("--out", help="The prompt file to be; not there yet, unless --force.")],
    pin: Annotated[
        str | None, typer.Option("--hash", help="What post pull printed: a student with another one is refused.")
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(
            help="Public texts of the same kind: far more is learnt for the same epsilon. --trials needs labels."
        ),
    ] = None,
    task: TaskName = None,
    template: Template = None,
    label_word: LabelWords = None,
    epsilon: Annotated[
        float | None, typer.Option(help=f"Privacy budget of the run; by default {DEFAULT_EPSILON:g}.")
    ] = None,
    no_dp: Annotated[bool, typer.Option("--no-dp", help="Tune without differential privacy: no guarantee.")] = False,
    delta: Annotated[float | None, typer.Option(help="Below 1 / rows (or users); by default chosen from it.")] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="c: each row's (or user's) gradient is clipped to this norm.")
    ] = None,
    user_column: UserColumn = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Learning rates to try; all are charged, the public rows' labels choose.")
    ] = 1,
    epsilon_cap: Annotated[
        float | None,
        typer.Option(
            envvar="POST_EPSILON_CAP",
            help="Most that all runs on these rows may spend; kept. By default POST_EPSILON_CAP.",
        ),
    ] = None,
    ledger: LedgerPath = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help=f"Steps of training; by default {PRIVATE.steps}, or {PLAIN.steps} with --no-dp."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Rows (or users) in a step, with DP on average; by default {PRIVATE.batch_size}, or {PLAIN.batch_size} "
            "with --no-dp.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help=f"At the start; it falls to 0. By default {PRIVATE.learning_rate:g}, or {PLAIN.learning_rate:g} with --no-dp."
        ),
    ] = None,
    prompt_init: Annotated[
        str | None, typer.Option(help="What the prompt starts from: instruction (words that state the task) or random.")
    ] = None,
    average_iterates: Annotated[
        bool, typer.Option("--average-iterates", help="Keep the average of the second half's iterates, not the last.")
    ] = False,
    num_virtual_tokens: Annotated[int | None, typer.Option(min=1, max=1000, help="Vectors in the prompt.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens of a text; the rest is cut.")] = None,
    text_column: Annotated[str, typer.Option(help="Name of the text column.")] = "text",
    label_column: Annotated[str, typer.Option(help="Name of the label column.")] = "label",
    checkpoint: Annotated[Path | None, typer.Option(help="Folder to go on from after a stop. It stays here.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Order of the batches without DP.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    statement: Annotated[Path | None, typer.Option(help="Keep the privacy statement as JSON in this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over --out and --statement if they are there.")] = False,
    json: AsJson = False,
) -> None:
    """Tune a soft prompt on private rows, on this machine, with differential privacy unless --no-dp.

    The same command goes on with a run that was stopped or killed, at no further cost. Once the prompt is there it is
    refused; with --force it is a new run, charged as one.
    """
    if no_dp and any(value is not None for value in (epsilon, delta, max_grad_norm, statement, user_column)):
        usage_error("--no-dp goes with none of --epsilon, --delta, --max-grad-norm, --user-column and --statement.")
    if public is not None and public.exists() and data.exists() and public.samefile(data):
        usage_error("--public is the private file itself: public texts enter without noise.")
    if trials > 1 and public is None:
        usage_error("--trials needs --public: the labels of public rows choose, since choosing by private ones costs.")
    chosen = task_from(task, template, label_word)
    check_outside(student, (to, statement, checkpoint, data, ledger))
    for path in (to, statement):
        if path is not None:
            check_writable(path)
            check_new(path, force)
    if no_dp:
        err.print(f"[bold yellow]{NO_GUARANTEE}[/]")
    settings: dict[str, Any] = {
        "num_virtual_tokens": num_virtual_tokens,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "prompt_init": prompt_init,
        "average_iterates": average_iterates or None,
        "seed": seed,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    columns = {"text_column": text_column, "label_column": label_column, "user_column": user_column}
    order = _order(data, chosen, columns, settings, None if no_dp else (epsilon, delta, max_grad_norm), public, trials)
    with open_ledger(ledger) as book:
        result, digest, found = _run(order, student, pin, chosen, book, epsilon_cap, checkpoint, device)
        size = _keep(result, digest, chosen, to, statement, force)
        _finish(book, result)
        account = book.account(order.rows, order.unit)  # type: ignore[arg-type]
    report_result(result, digest, to, size, account, found, json)


@dataclass(frozen=True)
class _Order:
    """What is to be done, all of it checked as far as that goes without the model."""

    name: str
    rows: list[Row]
    public: list[Row] | None
    config: TuneOptions
    privacy: PrivacyConfig | None
    trials: int

    @property
    def unit(self) -> str:
        return "row" if self.privacy is None else self.privacy.unit


def _order(
    data: Path,
    task: Task,
    columns: dict[str, str | None],
    settings: dict[str, Any],
    privacy: tuple[float | None, float | None, float | None] | None,
    public: Path | None,
    trials: int,
) -> _Order:
    """Read and check the rows."""
    from post_client.tuning.tune import charge_of, check_rows
    from post_shared.data.rows import read_rows

    config = (PLAIN if privacy is None else PRIVATE).replace(**settings)
    budget = None if privacy is None else privacy_config(*privacy, per_user=columns["user_column"] is not None)
    rows = read_rows(data, **columns, labels=task.labels or None)  # type: ignore[arg-type]
    with naming(data):
        check_rows(task, rows)
    known = None
    if public is not None:
        known = public_rows(public, columns, task if trials > 1 else None, rows)
        if trials > 1:
            with naming(public):
                check_rows(task, known)
    charge_of(rows, config, budget)  # whether (epsilon, delta) can be kept shows before the model is loaded
    return _Order(data.name, rows, known, config, budget, trials)


def _run(
    order: _Order,
    student: Path,
    pin: str | None,
    task: Task,
    book: Ledger,
    epsilon_cap: float | None,
    checkpoint: Path | None,
    device: str,
) -> tuple[TuneResult, str, tuple[Trial, ...]]:
    """Load the model and tune; Ctrl-C ends between two steps."""
    from post_client.students.checks import load_student
    from post_client.students.download import student_hash

    quiet_libraries()
    digest = student_hash(student, pin)
    err.print(f"Loading {escape(str(student))} …")
    model = load_student(student, device, private=order.privacy is not None)
    where = f"from {checkpoint}" if checkpoint else "from the beginning"
    stopped = (
        f"Stopped. The ledger has charged this run; the same command goes on {escape(where)}, with the same "
        "randomness, and costs nothing more."
    )
    with watched("tune", stopped) as on_progress:
        result, found = _tune(
            order, model, task, on_progress, checkpoint, partial(book.reserve, name=order.name, epsilon_cap=epsilon_cap)
        )
    return result, digest, found


def _tune(
    order: _Order,
    model: LanguageModel,
    task: Task,
    on_progress: ProgressCallback,
    checkpoint: Path | None,
    reserve: Reserve,
) -> tuple[TuneResult, tuple[Trial, ...]]:
    """One run, or several with different learning rates."""
    from post_client.tuning.search import search
    from post_client.tuning.tune import tune as tune_prompt

    common: dict[str, Any] = {
        "privacy": order.privacy,
        "public": None if order.public is None else [row.text for row in order.public],
        "on_progress": on_progress,
        "checkpoint": checkpoint,
        "reserve": reserve,
    }
    if order.trials == 1:
        return tune_prompt(model, task, order.rows, order.config, **common), ()
    judge = order.public or []
    found = search(model, task, order.rows, order.config, trials=order.trials, judge=judge, **common)
    return found.best, found.trials


def _keep(result: TuneResult, digest: str, task: Task, to: Path, statement: Path | None, force: bool) -> int:
    """Write the prompt file and the statement; the prompt file's size."""
    from post_client.tuning.export import prompt_file
    from post_shared.errors import InvalidInput
    from post_shared.files.prompt_file import write_prompt

    content = write_prompt(prompt_file(result, digest, task))
    try:
        if result.statement is not None and statement is not None:
            write_file(statement, result.statement.json().encode())
        write_file(to, content)  # last: once it is there, all is
    except InvalidInput:
        if statement is not None and not force:
            with suppress(OSError):
                statement.unlink(missing_ok=True)  # the same command would find it in its way
        err.print("The run is charged, but isn't finished: the same command makes the same prompt at no further cost.")
        raise
    return len(content)


def _finish(book: Ledger, result: TuneResult) -> None:
    """A ledger that can't be written any more takes nothing from the result: the charge is there already."""
    from post_shared.errors import LedgerInvalid

    assert result.run is not None
    try:
        book.finish(result.run)
    except LedgerInvalid as error:
        err.print(f"[bold yellow]The run stays charged and is shown as interrupted: {escape(error.detail)}[/]")
