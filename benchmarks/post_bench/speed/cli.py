"""``post bench speed``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from post_bench.speed.bench import Bench

NAMES = "transfer, transfer_constants, distil, tune, tune_whole, tune_target, predict, generate, memory"


def speed(
    json: Annotated[Path, typer.Option("--json", help="File for the figures; table and plot are written beside it.")],
    compare: Annotated[Path | None, typer.Option(help="Earlier figures; prints the ratios to them.")] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"Only this part; may be repeated: {NAMES}.")] = None,
    curves: Annotated[bool, typer.Option("--curves", help="Also time the steps at several sizes.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each part.")] = 5,
    batch_size: Annotated[int | None, typer.Option(min=1, help="For tune and transfer; default: their own.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Vectors of the trained prompt.")] = 20,
    target: Annotated[str | None, typer.Option(help="Folder, GGUF file or hub id; default: the demo's.")] = None,
    student: Annotated[str | None, typer.Option(help="Default: layers of the target, see --keep-layers.")] = None,
    keep_layers: Annotated[int, typer.Option(min=1, help="Layers of the default student.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Time every step against reference implementations, and its share of this machine's matrix rate."""
    from post_bench.speed import curves as cost
    from post_bench.speed import results
    from post_bench.speed.memory import transfer_memory
    from post_bench.speed.parts import PARTS
    from post_client.console import check_writable, quiet_libraries, usage_error

    table, plot = json.with_suffix(".md"), json.with_suffix(".png")
    for path in (json, table, plot):
        check_writable(path)
    before = results.read(compare) if compare else None
    all_parts = [*PARTS, "memory"]
    selected = part or all_parts
    unknown = sorted(set(selected) - set(all_parts))
    if unknown:
        usage_error(f"there is no part {unknown[0]!r}; the parts are: {', '.join(all_parts)}")
    quiet_libraries()
    bench = _bench(target, student, keep_layers, device, length, batch_size)
    speed_results, console = results.Speed(_about(bench, target, rounds)), Console(stderr=True)
    with console.status("") as status:
        for name in (name for name in PARTS if name in selected):
            status.update(f"{name} …")
            speed_results.parts[name] = PARTS[name](bench).run(rounds, bench.device, bench.target.dtype)
            speed_results.save(json)
        if "memory" in selected:
            status.update("memory of a transfer …")
            with tempfile.TemporaryDirectory() as folder:
                start = bench.prompt(bench.student)
                speed_results.memory = transfer_memory(
                    Path(folder), bench.target, bench.student, bench.task, bench.public, start
                )
        for name in cost.CURVES if curves else ():
            status.update(f"curve of {name} …")
            speed_results.curves[name] = cost.measure(bench, name, rounds)
            speed_results.save(json)
    speed_results.save(json)
    results.draw(speed_results, plot)
    shown = results.table(speed_results)
    table.write_text(shown, "utf-8")
    _print(shown, results.compared(speed_results.document(), before) if before else None)


def _print(*texts: str | None) -> None:
    for text in filter(None, texts):
        Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _bench(
    target: str | None, student: str | None, keep_layers: int, device: str, length: int, batch_size: int | None
) -> Bench:
    """The demo's models, reviews and prose, downloaded once as in the demo."""
    from post_bench.models import in_type, target_and_teacher
    from post_bench.speed.bench import Bench
    from post_client.demo import fetch
    from post_client.demo.settings import DemoSettings
    from post_client.demo.texts import make_texts
    from post_shared.data.tasks import Task
    from post_shared.method.distillation.layer_selection import chosen_layers
    from post_shared.model.language_model import LanguageModel
    from post_shared.model.layers import copy_student

    files = fetch.fetch()
    settings = DemoSettings()
    texts = make_texts(fetch.snippets(files), fetch.news(files), settings)
    large, teacher = target_and_teacher(target or fetch.model_file(files), device)
    small = (
        LanguageModel.load(student, device=device)
        if student
        else copy_student(large, chosen_layers(keep_layers, large.layers))
    )
    public = [row.text for row in texts.public[: settings.transfer.max_rows]]
    task = Task.preset(settings.task)
    own = teacher if teacher is not large else None
    learner = None if own is None else in_type(small, own.dtype)
    inputs = (large, small, task, texts.train, public, texts.corpus)
    return Bench(*inputs, length=length, batch_size=batch_size, teacher=own, learner=learner)


def _about(bench: Bench, target: str | None, rounds: int) -> dict[str, Any]:
    from post_bench.speed.machine import about
    from post_shared.schemas.transfers import TransferOptions
    from post_shared.schemas.tuning import PLAIN

    return {
        **about(bench.device),
        "target": target or "SmolLM2-135M-Instruct",
        "target_layers": bench.target.layers,
        "student_layers": bench.student.layers,
        "dtype": str(bench.target.dtype).removeprefix("torch."),
        "rounds": rounds,
        "length": bench.length,
        "tune": PLAIN.model_dump(),
        "transfer": TransferOptions().model_dump(),
        "batch_size": bench.batch_size,
    }
