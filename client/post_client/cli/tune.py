"""``post tune``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from post_client.cli.console import (
    AsJson,
    bar,
    check_writable,
    err,
    metrics_note,
    out,
    print_json,
    quiet_libraries,
    stop_gently,
    usage_error,
    write_file,
)
from post_client.cli.task_options import LabelWords, TaskName, Template, task_from

if TYPE_CHECKING:
    from post_client.privacy import PrivacyConfig
    from post_client.tuning import TuneResult
    from post_shared.tasks import Task

DEFAULT_EPSILON = 8.0
NO_GUARANTEE = (
    "NO PRIVACY GUARANTEE: this prompt is tuned without differential privacy. Whoever sees it may learn which "
    "rows it was tuned on."
)


def tune(
    student: Annotated[Path, typer.Option("--student", help="Folder of the student model (post pull).")],
    data: Annotated[Path, typer.Option("--data", help="Private rows: JSONL, CSV, TSV or Parquet. They stay here.")],
    to: Annotated[Path, typer.Option("--out", help="The prompt file to be.")],
    public: Annotated[
        Path | None,
        typer.Option(help="Public texts of the same kind, labels unread: far more is learnt for the same epsilon."),
    ] = None,
    task: TaskName = None,
    template: Template = None,
    label_word: LabelWords = None,
    epsilon: Annotated[
        float | None, typer.Option(help=f"Privacy budget of the run; by default {DEFAULT_EPSILON:g}.")
    ] = None,
    no_dp: Annotated[bool, typer.Option("--no-dp", help="Tune without differential privacy: no guarantee.")] = False,
    delta: Annotated[float | None, typer.Option(help="Below 1 / rows; by default chosen from it.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of one row's gradient.")] = None,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    start: Annotated[str | None, typer.Option(help="What the prompt starts from: task or random.")] = None,
    length: Annotated[int | None, typer.Option(min=1, max=1000, help="Vectors in the prompt.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens of a text; the rest is cut.")] = None,
    text_column: Annotated[str, typer.Option(help="Name of the text column.")] = "text",
    label_column: Annotated[str, typer.Option(help="Name of the label column.")] = "label",
    checkpoint: Annotated[Path | None, typer.Option(help="Folder to go on from after a stop. It stays here.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Order of the batches without DP.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    statement: Annotated[Path | None, typer.Option(help="Keep the privacy statement as JSON in this file.")] = None,
    json: AsJson = False,
) -> None:
    """Tune a soft prompt on private rows, on this machine, with differential privacy unless --no-dp."""
    if no_dp and any(value is not None for value in (epsilon, delta, clip, statement)):
        usage_error("--no-dp goes with none of --epsilon, --delta, --clip and --statement.")
    if public is not None and public.exists() and data.exists() and public.samefile(data):
        usage_error("--public is the private file itself: public texts enter without noise.")
    chosen = task_from(task, template, label_word)
    check_outside(student, (to, statement, checkpoint, data))
    for path in (to, statement):
        if path is not None:
            check_writable(path)
    if no_dp:
        err.print(f"[bold yellow]{NO_GUARANTEE}[/]")
    settings = {
        "length": length,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "start": start,
        "seed": seed,
    }
    result, digest = _tune(
        student, data, (text_column, label_column), chosen, settings, None if no_dp else (epsilon, delta, clip),
        public, checkpoint, device,
    )  # fmt: skip
    size = _write(result, digest, chosen, to)
    if result.statement is not None and statement is not None:
        write_file(statement, result.statement.json().encode())
    _report(result, digest, to, size, json)


def check_outside(student: Path, paths: Sequence[Path | None]) -> None:
    """A prompt names the student by a hash of its folder: nothing private may lie in there."""
    for path in paths:
        if path is not None and path.resolve().is_relative_to(student.resolve()):
            usage_error(
                f"{path} lies in the student's folder, and a hash of all that lies there leaves with the prompt."
            )


def _tune(
    student: Path,
    data: Path,
    columns: tuple[str, str],
    task: Task,
    settings: dict[str, Any],
    privacy: tuple[float | None, float | None, float | None] | None,
    public: Path | None,
    checkpoint: Path | None,
    device: str,
) -> tuple[TuneResult, str]:
    """Check what is quick to check, then load the model and tune."""
    from post_client.student_store import student_hash
    from post_client.tuning import PLAIN, PRIVATE, check_rows
    from post_client.tuning import tune as tune_prompt
    from post_shared.data import read_rows
    from post_shared.errors import Cancelled
    from post_shared.language_model import LanguageModel
    from post_shared.training import Progress

    quiet_libraries()
    given = {name: value for name, value in settings.items() if value is not None}
    config = replace(PLAIN if privacy is None else PRIVATE, **given)
    budget = None if privacy is None else privacy_config(*privacy)
    rows = read_rows(data, text_column=columns[0], label_column=columns[1], labels=task.labels or None)
    check_rows(task, rows)
    known = None if public is None else public_texts(public, columns[0], {row.text for row in rows})
    digest = student_hash(student)
    err.print(f"Loading {escape(str(student))} …")
    model = LanguageModel.load(student, device=device)
    with bar("tune") as show, stop_gently() as asked:

        def report(progress: Progress) -> None:
            show(progress.step, progress.steps, f"{progress.step}/{progress.steps}  {metrics_note(progress.metrics)}")
            if asked():
                raise Cancelled("stopped by Ctrl-C")

        try:
            result = tune_prompt(
                model, task, rows, config, privacy=budget, public=known, report=report, checkpoint=checkpoint
            )
        except Cancelled:
            kept = f"; the same command goes on from {checkpoint}" if checkpoint else "; nothing was kept"
            err.print(f"Stopped{escape(kept)}.")
            raise typer.Exit(130) from None
    return result, digest


def public_texts(public: Path, column: str, private: set[str]) -> list[str]:
    """The texts of ``public``. A warning for these eyes only when private ones are among them."""
    from post_client.lean import check_public
    from post_shared.data import read_rows

    texts = [row.text for row in read_rows(public, text_column=column, label_column=None)]
    check_public(texts, str(public))
    shared = len(private & set(texts))
    if shared:
        err.print(
            f"[bold yellow]{shared} texts of {escape(str(public))} are private rows too. Public texts enter without "
            "noise: for those rows nothing is promised. Take them out.[/]"
        )
    return texts


def privacy_config(epsilon: float | None, delta: float | None, clip: float | None) -> PrivacyConfig:
    from post_client.privacy import PrivacyConfig

    budget = PrivacyConfig(epsilon=DEFAULT_EPSILON if epsilon is None else epsilon, delta=delta)
    return budget if clip is None else replace(budget, clip_norm=clip)


def _write(result: TuneResult, digest: str, task: Task, to: Path) -> int:
    from post_client.prompt_making import prompt_file
    from post_shared.prompt_file import write_prompt

    content = write_prompt(prompt_file(result, digest, task))
    write_file(to, content)
    return len(content)


def _report(result: TuneResult, digest: str, to: Path, size: int, json: bool) -> None:
    if json:
        about = None if result.statement is None else result.statement.json()
        import json as json_module

        facts = {"file": str(to), "bytes": size, "model_hash": digest, "length": result.prompt.length}
        print_json(facts | {"statement": json_module.loads(about) if about else None})
        return
    out.print(escape(result.statement.words()) if result.statement else NO_GUARANTEE)
    out.print(f"\n{to} ({size:,} bytes). Send it: post push {to}", markup=False)
