"""``post audit``: attack tuned prompts on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from post_client.cli.private_inputs import DEFAULT_EPSILON, check_outside, privacy_config, public_rows
from post_client.cli.task_options import LabelWords, TaskName, Template, task_from
from post_client.console import check_writable, err, naming, quiet_libraries, training_bar, usage_error, write_file

if TYPE_CHECKING:
    from post_client.audit import Arm, AuditConfig, AuditReport
    from post_shared.data.tasks import Task


def audit(
    student: Annotated[Path, typer.Option("--student", help="Folder of the student model (from post pull).")],
    data: Annotated[
        Path, typer.Option("--data", help="Private rows: JSONL, CSV, TSV or Parquet. They stay on this machine.")
    ],
    public: Annotated[Path | None, typer.Option(help="Public texts, as in post tune.")] = None,
    task: TaskName = None,
    template: Template = None,
    label_word: LabelWords = None,
    shadows: Annotated[
        int, typer.Option(min=0, help="Shadow prompts with and without DP, for the LiRA attack; 0 skips it.")
    ] = 16,
    canaries: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Canaries of each kind, for the bound on epsilon; default: half the rows, at most 1000; 0 skips it.",
        ),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help=f"Claimed privacy budget of the private runs; default: {DEFAULT_EPSILON:g}.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Below 1 / rows; default: 1e-6.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clipping norm c of each row's gradient.")] = None,
    no_dp: Annotated[bool, typer.Option("--no-dp", help="Audit only tuning without differential privacy.")] = False,
    no_plain: Annotated[bool, typer.Option("--no-plain", help="Audit only tuning with differential privacy.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, as in post tune.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows per step, as in post tune.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Initial learning rate, as in post tune.")] = None,
    prompt_init: Annotated[str | None, typer.Option(help="Initial prompts: instruction or random.")] = None,
    num_virtual_tokens: Annotated[int | None, typer.Option(min=1, max=1000, help="Vectors in a prompt.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Longest text in tokens; the rest is cut.")] = None,
    text_column: Annotated[str, typer.Option(help="Name of the text column.")] = "text",
    label_column: Annotated[str, typer.Option(help="Name of the label column.")] = "label",
    json: Annotated[Path | None, typer.Option("--json", help="Write all figures to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the ROC curves to this PNG file.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for resuming an interrupted audit. It stays on this machine.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the random halves and canaries.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Attack prompts tuned on private rows: which rows leak, and does the claimed epsilon hold? Runs on this machine.

    Pass the same options as to post tune. Nothing is sent; the figures are private and stay on this machine.
    """
    if no_dp and any(value is not None for value in (epsilon, delta, max_grad_norm, canaries)):
        usage_error("--no-dp can't be combined with --epsilon, --delta, --max-grad-norm or --canaries.")
    if no_dp and no_plain:
        usage_error("With both --no-dp and --no-plain there is nothing to audit.")
    if plot is not None and shadows == 0:
        usage_error("--plot draws LiRA's ROC curves, so it needs --shadows above 0.")
    audited_task = task_from(task, template, label_word)
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
    settings = {name: value for name, value in settings.items() if value is not None}
    arms, config = _plan(
        settings, (epsilon, delta, max_grad_norm), shadows, canaries, seed, plain=not no_plain, private=not no_dp
    )
    report = _audit(student, data, (text_column, label_column), audited_task, arms, config, public, checkpoint, device)
    _write(report, json, plot)


def _plan(
    settings: dict[str, Any],
    budget: tuple[float | None, float | None, float | None],
    shadows: int,
    canaries: int | None,
    seed: int,
    *,
    plain: bool,
    private: bool,
) -> tuple[list[Arm], AuditConfig]:
    """The arms to audit, each with the settings that ``post tune`` would use, and the audit's configuration."""
    from post_client.audit import Arm, AuditConfig
    from post_shared.schemas.tuning import PLAIN, PRIVATE

    arms = [Arm(PLAIN.replace(**settings), None)] if plain else []
    arms += [Arm(PRIVATE.replace(**settings), privacy_config(*budget))] if private else []
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
    """Check the inputs, then load the model and audit."""
    from post_client.audit import audit as audit_prompts
    from post_client.students.checks import load_student
    from post_client.tuning.tune import check_rows
    from post_shared.data.rows import read_rows

    quiet_libraries()
    rows = read_rows(data, text_column=columns[0], label_column=columns[1], labels=task.labels or None)
    with naming(data):
        check_rows(task, rows)
    public_texts = None
    if public is not None:
        public_texts = [row.text for row in public_rows(public, {"text_column": columns[0]}, None, rows)]
    err.print(f"Loading {escape(str(student))} …")
    model = load_student(student, device)
    resume = f"; the same command resumes from {checkpoint}" if checkpoint else "; nothing was saved"
    with training_bar("audit", f"Stopped{escape(resume)}.") as on_progress:
        return audit_prompts(
            model, task, rows, arms, config, public=public_texts, on_progress=on_progress, checkpoint=checkpoint
        )


def _write(report: AuditReport, json: Path | None, plot: Path | None) -> None:
    """Write the requested files and print the tables."""
    from post_client.audit import to_json, to_markdown, to_picture

    if json is not None:
        write_file(json, to_json(report).encode())
    if plot is not None:
        write_file(plot, to_picture(report))
    typer.echo(to_markdown(report), nl=False)
