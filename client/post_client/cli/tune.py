"""``post tune``: tune a prompt on private rows."""

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
    training_bar,
    usage_error,
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
    student: Annotated[Path, typer.Option("--student", help="Folder of the student model (from post pull).")],
    data: Annotated[
        Path, typer.Option("--data", help="Private rows: JSONL, CSV, TSV or Parquet. They stay on this machine.")
    ],
    output: Annotated[Path, typer.Option("--out", help="Prompt file to write; must not exist, unless --force.")],
    pin: Annotated[
        str | None, typer.Option("--hash", help="Model hash printed by post pull; a changed student is refused.")
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(
            help="Public texts of the same kind; improves accuracy at the same epsilon. --trials needs labels."
        ),
    ] = None,
    task: TaskName = None,
    template: Template = None,
    label_word: LabelWords = None,
    epsilon: Annotated[
        float | None, typer.Option(help=f"Privacy budget of the run; default: {DEFAULT_EPSILON:g}.")
    ] = None,
    no_dp: Annotated[
        bool, typer.Option("--no-dp", help="Tune without differential privacy: no privacy guarantee.")
    ] = False,
    delta: Annotated[float | None, typer.Option(help="Below 1 / rows (or users); default: 1e-6.")] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clipping norm c of each row's (or user's) gradient.")
    ] = None,
    user_column: UserColumn = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Number of learning rates to try; all are charged, public labels choose.")
    ] = 1,
    epsilon_cap: Annotated[
        float | None,
        typer.Option(
            envvar="POST_EPSILON_CAP",
            help="Cap on the epsilon of all runs on these rows, kept in the ledger; default: POST_EPSILON_CAP.",
        ),
    ] = None,
    ledger: LedgerPath = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help=f"Training steps; default: {PRIVATE.steps}, or {PLAIN.steps} with --no-dp."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Rows (or users) per step, with DP on average; default: {PRIVATE.batch_size}, or {PLAIN.batch_size} "
            "with --no-dp.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help=f"Initial learning rate, decays to 0; default: {PRIVATE.learning_rate:g}, or {PLAIN.learning_rate:g} "
            "with --no-dp."
        ),
    ] = None,
    prompt_init: Annotated[
        str | None, typer.Option(help="Initial prompt: instruction (text that states the task) or random.")
    ] = None,
    average_iterates: Annotated[
        bool,
        typer.Option("--average-iterates", help="Return the average iterate of the second half, not the last one."),
    ] = False,
    num_virtual_tokens: Annotated[int | None, typer.Option(min=1, max=1000, help="Vectors in the prompt.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Longest text in tokens; the rest is cut.")] = None,
    text_column: Annotated[str, typer.Option(help="Name of the text column.")] = "text",
    label_column: Annotated[str, typer.Option(help="Name of the label column.")] = "label",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for resuming an interrupted run. It stays on this machine.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed for the batch order without DP.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    statement: Annotated[Path | None, typer.Option(help="Write the privacy statement to this JSON file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out and --statement if they exist.")] = False,
    json: AsJson = False,
) -> None:
    """Tune a soft prompt on private rows, on this machine, with differential privacy unless --no-dp.

    The same command resumes an interrupted run at no further cost. If the prompt file exists, the command is refused;
    with --force it starts and charges a new run.
    """
    if no_dp and any(value is not None for value in (epsilon, delta, max_grad_norm, statement, user_column)):
        usage_error("--no-dp can't be combined with --epsilon, --delta, --max-grad-norm, --user-column or --statement.")
    if public is not None and public.exists() and data.exists() and public.samefile(data):
        usage_error("--public is the private file itself, but public texts are used without noise.")
    if trials > 1 and public is None:
        usage_error("--trials needs --public: trials are compared on public labels; private ones would cost budget.")
    tuned_task = task_from(task, template, label_word)
    check_outside(student, (output, statement, checkpoint, data, ledger))
    for path in (output, statement):
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
    budget = None if no_dp else (epsilon, delta, max_grad_norm)
    inputs = _read_inputs(data, tuned_task, columns, settings, budget, public, trials)
    with open_ledger(ledger) as privacy_ledger:
        result, digest, trials_made = _run(
            inputs, student, pin, tuned_task, privacy_ledger, epsilon_cap, checkpoint, device
        )
        size = _write(result, digest, tuned_task, output, statement, force)
        _finish(privacy_ledger, result)
        account = privacy_ledger.account(inputs.rows, inputs.unit)  # type: ignore[arg-type]
    report_result(result, digest, output, size, account, trials_made, json)


@dataclass(frozen=True)
class _Inputs:
    """The rows and settings of a run, checked as far as possible without the model."""

    name: str
    rows: list[Row]
    public: list[Row] | None
    config: TuneOptions
    privacy: PrivacyConfig | None
    trials: int

    @property
    def unit(self) -> str:
        return "row" if self.privacy is None else self.privacy.unit


def _read_inputs(
    data: Path,
    task: Task,
    columns: dict[str, str | None],
    settings: dict[str, Any],
    privacy: tuple[float | None, float | None, float | None] | None,
    public: Path | None,
    trials: int,
) -> _Inputs:
    """Read and check the rows."""
    from post_client.tuning.tune import charge_of, check_rows
    from post_shared.data.rows import read_rows

    config = (PLAIN if privacy is None else PRIVATE).replace(**settings)
    budget = None if privacy is None else privacy_config(*privacy, per_user=columns["user_column"] is not None)
    rows = read_rows(data, **columns, labels=task.labels or None)  # type: ignore[arg-type]
    with naming(data):
        check_rows(task, rows)
    public_data = None
    if public is not None:
        public_data = public_rows(public, columns, task if trials > 1 else None, rows)
        if trials > 1:
            with naming(public):
                check_rows(task, public_data)
    charge_of(rows, config, budget)  # refuses an impossible (epsilon, delta) before the model is loaded
    return _Inputs(data.name, rows, public_data, config, budget, trials)


def _run(
    inputs: _Inputs,
    student: Path,
    pin: str | None,
    task: Task,
    privacy_ledger: Ledger,
    epsilon_cap: float | None,
    checkpoint: Path | None,
    device: str,
) -> tuple[TuneResult, str, tuple[Trial, ...]]:
    """Load the model and tune. Ctrl-C stops between two steps."""
    from post_client.students.checks import load_student
    from post_client.students.download import student_hash

    quiet_libraries()
    digest = student_hash(student, pin)
    err.print(f"Loading {escape(str(student))} …")
    model = load_student(student, device, private=inputs.privacy is not None)
    how = f"resumes from {checkpoint}" if checkpoint else "starts again"
    stopped = (
        f"Stopped. The ledger has charged this run; the same command {escape(how)} with the same "
        "randomness and costs nothing more."
    )
    reserve = partial(privacy_ledger.reserve, name=inputs.name, epsilon_cap=epsilon_cap)
    with training_bar("tune", stopped) as on_progress:
        result, trials = _tune(inputs, model, task, on_progress, checkpoint, reserve)
    return result, digest, trials


def _tune(
    inputs: _Inputs,
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
        "privacy": inputs.privacy,
        "public": None if inputs.public is None else [row.text for row in inputs.public],
        "on_progress": on_progress,
        "checkpoint": checkpoint,
        "reserve": reserve,
    }
    if inputs.trials == 1:
        return tune_prompt(model, task, inputs.rows, inputs.config, **common), ()
    judge = inputs.public or []
    searched = search(model, task, inputs.rows, inputs.config, trials=inputs.trials, judge=judge, **common)
    return searched.best, searched.trials


def _write(result: TuneResult, digest: str, task: Task, output: Path, statement: Path | None, force: bool) -> int:
    """Write the prompt file and the statement. Returns the prompt file's size in bytes."""
    from post_client.tuning.export import prompt_file
    from post_shared.errors import InvalidInput
    from post_shared.files.prompt_file import write_prompt

    content = write_prompt(prompt_file(result, digest, task))
    try:
        if result.statement is not None and statement is not None:
            write_file(statement, result.statement.json().encode())
        write_file(output, content)  # last: once the prompt exists, the run is complete
    except InvalidInput:
        if statement is not None and not force:
            with suppress(OSError):
                statement.unlink(missing_ok=True)  # otherwise the same command would be refused
        err.print("The run is charged but not finished: the same command makes the same prompt at no further cost.")
        raise
    return len(content)


def _finish(privacy_ledger: Ledger, result: TuneResult) -> None:
    """Mark the run as finished. If the ledger can't be written, only warn: the run was charged before."""
    from post_shared.errors import LedgerInvalid

    assert result.run is not None
    try:
        privacy_ledger.finish(result.run)
    except LedgerInvalid as error:
        err.print(f"[bold yellow]The run stays charged but is listed as interrupted: {escape(error.detail)}[/]")
