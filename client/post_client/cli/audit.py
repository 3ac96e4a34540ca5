"""``post audit``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from post_client.cli.private_inputs import DEFAULT_EPSILON, check_outside, privacy_config, public_rows
from post_client.cli.task_options import LabelWords, TaskName, Template, task_from
from post_client.console import check_writable, err, naming, quiet_libraries, usage_error, watched, write_file

if TYPE_CHECKING:
    from post_client.audit import Arm, AuditConfig, AuditReport
    from post_shared.data.tasks import Task


def audit(
    student: Annotated[Path, typer.Option("--student", help="Folder of the student model (post pull).")],
    data: Annotated[Path, typer.Option("--data", help="Private rows: JSONL, CSV, TSV or Parquet. They stay here.")],
    public: Annotated[Path | None, typer.Option(help="Public texts, if post tune is given some.")] = None,
    task: TaskName = None,
    template: Template = None,
    label_word: LabelWords = None,
    shadows: Annotated[
        int, typer.Option(min=0, help="Shadow prompts with and without DP, for the attack LiRA; 0 leaves it out.")
    ] = 16,
    canaries: Annotated[
        int | None,
        typer.Option(min=0, help="Canaries of each kind for the bound on epsilon, by default half the rows; 0: none."),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help=f"Privacy budget that the private runs claim; by default {DEFAULT_EPSILON:g}.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Below 1 / rows; by default chosen from it.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="c: each row's gradient is clipped to this norm.")] = None,
    no_dp: Annotated[bool, typer.Option("--no-dp", help="Audit only tuning without differential privacy.")] = False,
    no_plain: Annotated[bool, typer.Option("--no-plain", help="Audit only tuning with differential privacy.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of training, as in post tune.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows in a step, as in post tune.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At the start, as in post tune.")] = None,
    prompt_init: Annotated[str | None, typer.Option(help="What the prompts start from: instruction or random.")] = None,
    num_virtual_tokens: Annotated[int | None, typer.Option(min=1, max=1000, help="Vectors in a prompt.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens of a text; the rest is cut.")] = None,
    text_column: Annotated[str, typer.Option(help="Name of the text column.")] = "text",
    label_column: Annotated[str, typer.Option(help="Name of the label column.")] = "label",
    json: Annotated[Path | None, typer.Option("--json", help="Keep all figures as JSON in this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Keep the ROC curves as PNG in this file.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder to go on from after a stop. It stays here.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws halves and canaries.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Attack prompts tuned on private rows, on this machine: who could be found, and can the claimed epsilon be true?

    Give the options that post tune is given. Nothing is sent; the figures are private and stay here.
    """
    if no_dp and any(value is not None for value in (epsilon, delta, max_grad_norm, canaries)):
        usage_error("--no-dp goes with none of --epsilon, --delta, --max-grad-norm and --canaries.")
    if no_dp and no_plain:
        usage_error("--no-dp and --no-plain leave nothing to audit.")
    if plot is not None and shadows == 0:
        usage_error("--plot shows LiRA's curves: it needs --shadows above 0.")
    chosen = task_from(task, template, label_word)
    check_outside(student, (json, plot, checkpoint, data))
    for path in (json, plot):
        if path is not None:
            check_writable(path)
    settings = {
        "num_virtual_tokens": num_virtual_tokens,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "prompt_init": prompt_init,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    arms, config = _plan(
        given, (epsilon, delta, max_grad_norm), shadows, canaries, seed, plain=not no_plain, private=not no_dp
    )
    report = _audit(student, data, (text_column, label_column), chosen, arms, config, public, checkpoint, device)
    _write(report, json, plot)


def _plan(
    given: dict[str, Any],
    budget: tuple[float | None, float | None, float | None],
    shadows: int,
    canaries: int | None,
    seed: int,
    *,
    plain: bool,
    private: bool,
) -> tuple[list[Arm], AuditConfig]:
    """The ways of tuning to audit, with the settings that ``post tune`` would take for each."""
    from post_client.audit import Arm, AuditConfig
    from post_shared.schemas.tuning import PLAIN, PRIVATE

    arms = [Arm(PLAIN.replace(**given), None)] if plain else []
    arms += [Arm(PRIVATE.replace(**given), privacy_config(*budget))] if private else []
    return arms, AuditConfig(shadows, canaries if private else 0, seed=seed)


def _audit(
    student: Path,
    data: Path,
    columns: tuple[str, str],
    task: Task,
    arms: list[Arm],
    config: AuditConfig,
    public: Path | None,
    checkpoint: Path | None,
    device: str,
) -> AuditReport:
    """Check what is quick to check, then load the model and audit."""
    from post_client.audit import audit as audit_prompts
    from post_client.students.checks import load_student
    from post_client.tuning.tune import check_rows
    from post_shared.data.rows import read_rows

    quiet_libraries()
    rows = read_rows(data, text_column=columns[0], label_column=columns[1], labels=task.labels or None)
    with naming(data):
        check_rows(task, rows)
    known = None
    if public is not None:
        texts = public_rows(public, {"text_column": columns[0]}, None, rows)
        known = [row.text for row in texts]
    err.print(f"Loading {escape(str(student))} …")
    model = load_student(student, device)
    kept = f"; the same command goes on from {checkpoint}" if checkpoint else "; nothing was kept"
    with watched("audit", f"Stopped{escape(kept)}.") as report:
        return audit_prompts(model, task, rows, arms, config, public=known, on_progress=report, checkpoint=checkpoint)


def _write(report: AuditReport, json: Path | None, plot: Path | None) -> None:
    from post_client.audit import to_json, to_markdown, to_picture

    if json is not None:
        write_file(json, to_json(report).encode())
    if plot is not None:
        write_file(plot, to_picture(report))
    typer.echo(to_markdown(report), nl=False)
