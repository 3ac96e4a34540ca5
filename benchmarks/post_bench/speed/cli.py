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
    json: Annotated[Path, typer.Option("--json", help="The figures; table and picture come beside it.")],
    compare: Annotated[Path | None, typer.Option(help="Earlier figures: print the ratios to them.")] = None,
    part: Annotated[list[str] | None, typer.Option(help=f"Only these parts; may be repeated: {NAMES}.")] = None,
    curves: Annotated[bool, typer.Option("--curves", help="Also how costs grow with each size: minutes more.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each part.")] = 5,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Of tune and transfer, not the defaults.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Vectors of the prompt that is trained.")] = 20,
    target: Annotated[str | None, typer.Option(help="Folder, GGUF file or hub id; by default the demo's.")] = None,
    student: Annotated[str | None, typer.Option(help="By default layers of the target, as many as named.")] = None,
    keep_layers: Annotated[int, typer.Option(min=1, help="Layers of the student that is made.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Time of every step against plain references, and its share of what this machine's matrix rate allows."""
    from post_bench.speed import curves as cost
    from post_bench.speed import results
    from post_bench.speed.memory import transfer_memory
    from post_bench.speed.parts import PARTS
    from post_client.console import check_writable, quiet_libraries, usage_error

    table, plot = json.with_suffix(".md"), json.with_suffix(".png")
    for path in (json, table, plot):
        check_writable(path)
    before = results.read(compare) if compare else None
    every = [*PARTS, "memory"]
    wanted = part or every
    unknown = sorted(set(wanted) - set(every))
    if unknown:
        usage_error(f"there is no part {unknown[0]!r}; there are: {', '.join(every)}")
    quiet_libraries()
    bench = _bench(target, student, keep_layers, device, length, batch_size)
    found, console = results.Speed(_about(bench, target, rounds)), Console(stderr=True)
    with console.status("") as status:
        for name in (name for name in PARTS if name in wanted):
            status.update(f"{name} …")
            found.parts[name] = PARTS[name](bench).run(rounds, bench.device, bench.target.dtype)
            found.save(json)
        if "memory" in wanted:
            status.update("memory of a transfer …")
            with tempfile.TemporaryDirectory() as folder:
                start = bench.prompt(bench.student)
                found.memory = transfer_memory(
                    Path(folder), bench.target, bench.student, bench.task, bench.public, start
                )
        for name in cost.CURVES if curves else ():
            status.update(f"curve of {name} …")
            found.curves[name] = cost.measure(bench, name, rounds)
            found.save(json)
    found.save(json)
    results.draw(found, plot)
    shown = results.table(found)
    table.write_text(shown, "utf-8")
    _print(shown, results.compared(found.document(), before) if before else None)


def _print(*texts: str | None) -> None:
    for text in filter(None, texts):
        Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _bench(
    target: str | None, student: str | None, keep_layers: int, device: str, length: int, batch_size: int | None
) -> Bench:
    """Real models, and film reviews, product reviews and prose, fetched once as the demo's are."""
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
    every = (large, small, task, texts.train, public, texts.corpus)
    return Bench(*every, length=length, batch_size=batch_size, teacher=own, learner=learner)


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
