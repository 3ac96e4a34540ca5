"""What the commands share: options, consoles, progress bars. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from post_shared.cli.output import print_table
from post_shared.errors import Cancelled, InvalidInput
from post_shared.files.atomic import replacing

if TYPE_CHECKING:
    from post_client.client import Client
    from post_client.resources.jobs import Job
    from post_shared.schemas.jobs import Job as JobDocument
    from post_shared.training.progress import Progress as TrainingProgress
    from post_shared.training.progress import ProgressCallback

Url = Annotated[
    str | None, typer.Option("--url", help="Server address; default: POST_URL. The API key comes from POST_API_KEY.")
]

err = Console(stderr=True, soft_wrap=True, highlight=False)
out = Console(soft_wrap=True, highlight=False)


def connect(url: str | None) -> Client:
    """A client for the server given by ``--url`` or the environment."""
    from post_client.client import Client

    return Client(url=url)


def print_facts(facts: Mapping[str, Any], *, console: Console = out) -> None:
    """Print names and values, one per line."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if value is not None:
            table.add_row(f"[bold]{escape(name)}[/]", escape(str(value)))
    print_table(table, console)


def confirm(question: str, *, default: bool) -> bool | None:
    """Ask a yes/no question on the terminal; None if there is no input."""
    try:
        return typer.confirm(question, default=default, err=True)
    except typer.Abort as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        err.print()
        return None


def usage_error(message: str) -> NoReturn:
    """Exit with status 2: the options are wrong or don't go together."""
    raise typer.BadParameter(message)


def check_writable(path: Path) -> None:
    """Check, before minutes of work, that the result can be written to ``path``.

    Raises:
        InvalidInput: it can't.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InvalidInput(f"{path}: can't write: {error.strerror or error}") from error
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder; give the path of a file")


def check_new(path: Path, force: bool) -> None:
    """Don't overwrite, without ``force``, a file that costs privacy budget to make again.

    Raises:
        InvalidInput: the file exists and ``force`` is false.
    """
    if (path.exists() or path.is_symlink()) and not force:
        raise InvalidInput(
            f"{path} already exists. Nothing was charged and nothing was trained: choose another file, or overwrite it "
            "with --force"
        )


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically, readable by its owner only.

    Raises:
        InvalidInput: it can't be written.
    """
    try:
        with replacing(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise InvalidInput(f"{path}: can't write: {error.strerror or error}") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Prefix an error about a file's content with the file's path."""
    try:
        yield
    except InvalidInput as error:
        error.detail = f"{path}: {error.detail}"
        raise


def read_file(path: Path) -> bytes:
    """The bytes of a file given on the command line."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: can't read: {error.strerror or error}") from error


# --- progress -----------------------------------------------------------------------------------------


@contextmanager
def bar(title: str, *columns: ProgressColumn) -> Iterator[Callable[[float, float, str], None]]:
    """A progress bar on stderr. It appears at the first ``show(done, total, note)``, so refused work shows none."""
    layout = (TextColumn("[bold]{task.description}"), BarColumn(), *columns, TextColumn("{task.fields[note]}"))
    progress = Progress(*layout, TimeElapsedColumn(), console=err)
    task = progress.add_task(title, total=None, note="")
    with ExitStack() as stack:

        def show(done: float, total: float, note: str = "") -> None:
            if not progress.live.is_started:
                stack.enter_context(progress)
            progress.update(task, completed=done, total=total, note=escape(note))

        yield show


def byte_column() -> ProgressColumn:
    return DownloadColumn()


def metrics_note(metrics: Mapping[str, float]) -> str:
    """``loss 0.412  ε 3.10``"""
    names = {"epsilon": "ε"}
    return "  ".join(f"{names.get(name, name)} {value:.3f}" for name, value in metrics.items())


def follow(job: Job) -> Job:
    """Wait for a job and show a progress bar. On Ctrl-C, ask whether to leave the job running."""
    from post_shared.errors import Unavailable

    try:
        with bar(f"{job.document.kind} {job.id}") as show, interruptible(signal.SIGINT) as stopped:

            def on_change(document: JobDocument) -> None:
                if stopped():
                    raise KeyboardInterrupt
                note = "  ".join(filter(None, [document.stage or str(document.state), metrics_note(document.metrics)]))
                show(document.progress, 1.0, note)

            return job.wait(progress=on_change)
    except KeyboardInterrupt:
        leave = not err.is_terminal or confirm("\nLeave the job running at the provider?", default=True)
        if leave is False:
            job.cancel()
            err.print(f"Cancelling {job.id}.")
        else:
            err.print(f"{job.id} keeps running. Watch: post jobs watch {job.id}   Cancel: post jobs cancel {job.id}")
        raise typer.Exit(130) from None
    except Unavailable:
        err.print(f"Lost the connection to {job.id}. Try again later: post jobs watch {job.id}")
        raise


@contextmanager
def interruptible(*signals: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Raise KeyboardInterrupt on each of ``signals``, as Ctrl-C does by default. Yields a function that tells whether
    one was received: a library can swallow the exception, so long work polls the function.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_gently() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C only makes the yielded function return true; the second one interrupts."""
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def training_bar(title: str, stopped: str) -> Iterator[ProgressCallback]:
    """A progress bar for local training. Ctrl-C ends it between two steps, prints ``stopped`` and exits with 130.

    Raises:
        typer.Exit: instead of :class:`post_shared.errors.Cancelled`.
    """
    with bar(title) as show, stop_gently() as stop_requested:

        def on_progress(progress: TrainingProgress) -> None:
            stage = "" if progress.stage == title else f"{progress.stage}  "
            note = f"{stage}{progress.step}/{progress.steps}  {metrics_note(progress.metrics)}"
            show(progress.step, progress.steps, note)
            if stop_requested():
                raise Cancelled("stopped by Ctrl-C")

        try:
            yield on_progress
        except Cancelled:
            err.print(stopped)
            raise typer.Exit(130) from None


def quiet_libraries() -> None:
    """Turn off the progress bars and warnings of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
