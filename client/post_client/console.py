"""What the verbs share: options, the two streams, progress bars. Results go to stdout, all else to stderr."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
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

if TYPE_CHECKING:
    from post_client.client import Client
    from post_client.resources.jobs import Job
    from post_shared.schemas.jobs import Job as JobDocument
    from post_shared.training.progress import Progress as TrainingProgress
    from post_shared.training.progress import ProgressCallback

Url = Annotated[
    str | None, typer.Option("--url", help="Address of the server; by default POST_URL. The key is POST_API_KEY.")
]

err = Console(stderr=True, soft_wrap=True, highlight=False)
out = Console(soft_wrap=True, highlight=False)


def connect(url: str | None) -> Client:
    """The client of the server that the option or the environment names."""
    from post_client.client import Client

    return Client(url=url)


def print_facts(facts: Mapping[str, Any], *, console: Console = out) -> None:
    """Names and values, one a line."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if value is not None:
            table.add_row(f"[bold]{escape(name)}[/]", escape(str(value)))
    print_table(table, console)


def confirm(question: str, *, default: bool) -> bool | None:
    """The answer of whoever sits there; None if nobody does."""
    try:
        return typer.confirm(question, default=default, err=True)
    except typer.Abort as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        err.print()
        return None


def usage_error(message: str) -> NoReturn:
    """End with exit code 2: the options don't fit together."""
    raise typer.BadParameter(message)


def check_writable(path: Path) -> None:
    """Find out before minutes of work, not after, that a result couldn't be kept.

    Raises:
        InvalidInput: no file can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InvalidInput(f"{path}: can't write: {error.strerror or error}") from error
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder; name a file")


def check_new(path: Path, force: bool) -> None:
    """What can't be had again at no cost is not written over unasked.

    Raises:
        InvalidInput: the file is there already, and ``force`` wasn't said.
    """
    if (path.exists() or path.is_symlink()) and not force:
        raise InvalidInput(
            f"{path} is there already. Nothing was charged and nothing trained: name another file, or say --force to "
            "write over it"
        )


def write_file(path: Path, data: bytes) -> None:
    """Write a file at once and whole; only its owner may read it.

    Raises:
        InvalidInput: it can't be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise InvalidInput(f"{path}: can't write: {error.strerror or error}") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error about what a file holds says which file it is."""
    try:
        yield
    except InvalidInput as error:
        error.detail = f"{path}: {error.detail}"
        raise


def read_file(path: Path) -> bytes:
    """The bytes of a file that was named on the command line."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: can't read: {error.strerror or error}") from error


# --- progress -----------------------------------------------------------------------------------------


@contextmanager
def bar(what: str, *columns: ProgressColumn) -> Iterator[Callable[[float, float, str], None]]:
    """A bar on stderr, from the first ``show(done, total, note)`` on: work that is refused at once shows none."""
    layout = (TextColumn("[bold]{task.description}"), BarColumn(), *columns, TextColumn("{task.fields[note]}"))
    progress = Progress(*layout, TimeElapsedColumn(), console=err)
    task = progress.add_task(what, total=None, note="")
    with ExitStack() as shown:

        def show(done: float, total: float, note: str = "") -> None:
            if not progress.live.is_started:
                shown.enter_context(progress)
            progress.update(task, completed=done, total=total, note=escape(note))

        yield show


def byte_column() -> ProgressColumn:
    return DownloadColumn()


def metrics_note(metrics: Mapping[str, float]) -> str:
    """``loss 0.412  ε 3.10``"""
    names = {"epsilon": "ε"}
    return "  ".join(f"{names.get(name, name)} {value:.3f}" for name, value in metrics.items())


def follow(job: Job) -> Job:
    """Wait for a job with a bar. Ctrl-C offers to leave it running."""
    from post_shared.errors import Unavailable

    try:
        with bar(f"{job.document.kind} {job.id}") as show, interruptible(signal.SIGINT) as stopped:

            def heard(document: JobDocument) -> None:
                if stopped():
                    raise KeyboardInterrupt
                note = "  ".join(filter(None, [document.stage or str(document.state), metrics_note(document.metrics)]))
                show(document.progress, 1.0, note)

            return job.wait(progress=heard)
    except KeyboardInterrupt:
        leave = not err.is_terminal or confirm("\nLeave the job running at the provider?", default=True)
        if leave is False:
            job.cancel()
            err.print(f"Cancelling {job.id}.")
        else:
            err.print(f"{job.id} goes on. Watch it: post jobs watch {job.id}   Cancel it: post jobs cancel {job.id}")
        raise typer.Exit(130) from None
    except Unavailable:
        err.print(f"Lost sight of {job.id}. Look again later: post jobs watch {job.id}")
        raise


@contextmanager
def interruptible(*signals: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Each of ``signals`` interrupts at once, as Ctrl-C does by default. Yields whether one came: an exception that is
    raised at a bad moment can be lost inside a library, so long work asks now and then.
    """
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = {each: signal.signal(each, interrupt) for each in signals}
    try:
        yield lambda: bool(came)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def stop_gently() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C only makes the yielded ``asked()`` true; the second one interrupts."""
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def watched(what: str, stopped: str) -> Iterator[ProgressCallback]:
    """A bar for training on this machine. Ctrl-C ends it between two steps: ``stopped`` is said, the exit status 130.

    Raises:
        typer.Exit: in the place of :class:`post_shared.errors.Cancelled`.
    """
    with bar(what) as show, stop_gently() as asked:

        def on_progress(progress: TrainingProgress) -> None:
            stage = "" if progress.stage == what else f"{progress.stage}  "
            note = f"{stage}{progress.step}/{progress.steps}  {metrics_note(progress.metrics)}"
            show(progress.step, progress.steps, note)
            if asked():
                raise Cancelled("stopped by Ctrl-C")

        try:
            yield on_progress
        except Cancelled:
            err.print(stopped)
            raise typer.Exit(130) from None


def quiet_libraries() -> None:
    """No bars and notes of the libraries between ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
