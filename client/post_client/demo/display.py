"""The demo's progress display: one line per stage with its time; plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

LOG_INTERVAL_SECONDS = 30.0
"""Without a terminal, the shortest time between two lines of progress."""


@dataclass
class Stage:
    """One line. ``seconds`` is None while the stage is running."""

    name: str
    side: str
    description: str
    started: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    failed: bool = False
    note: str = ""

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started if self.seconds is None else self.seconds


class Display:
    """``with display: with display.stage(...) as note: ... note("3/10")``

    A library can swallow the KeyboardInterrupt that a signal handler raises, so ``stage`` and ``note`` raise it again
    once ``stopped()`` is true.
    """

    def __init__(self, console: Console, stopped: Callable[[], bool] = lambda: False) -> None:
        self.console = console
        self.stopped = stopped
        self.stages: list[Stage] = []
        self._spinner = Spinner("dots")
        self._live: AbstractContextManager[object] = (
            Live(get_renderable=self._render, console=console, refresh_per_second=8)
            if console.is_terminal
            else nullcontext()
        )

    def __enter__(self) -> Display:
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.__exit__(None, None, None)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage."""
        return {stage.name: round(stage.elapsed, 2) for stage in self.stages}

    @contextmanager
    def stage(self, name: str, side: str, description: str) -> Iterator[Callable[[str], None]]:
        """Time a stage; the yielded function sets its progress note."""
        self._stop_if_requested()
        stage = Stage(name, side, description)
        self.stages.append(stage)
        self._print_line(f"{side:8}  {description} …")
        last_printed = time.monotonic()

        def note(text: str) -> None:
            nonlocal last_printed
            self._stop_if_requested()
            stage.note = text
            if time.monotonic() - last_printed >= LOG_INTERVAL_SECONDS:
                last_printed = time.monotonic()
                self._print_line(f"{'':8}  {stage.name} {stage.elapsed:.0f} s  {text}")

        try:
            yield note
        except BaseException:
            stage.failed = True
            raise
        finally:
            stage.seconds = stage.elapsed
            outcome = "failed" if stage.failed else "done"
            self._print_line(f"{'':8}  {stage.name} {outcome} in {stage.seconds:.1f} s  {stage.note}")

    def _stop_if_requested(self) -> None:
        if self.stopped():
            raise KeyboardInterrupt

    def _print_line(self, line: str) -> None:
        if not self.console.is_terminal:
            self.console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for stage in self.stages:
            mark: RenderableType = self._spinner
            if stage.seconds is not None:
                mark = Text("✗", "red") if stage.failed else Text("✓", "green")
            table.add_row(
                mark, f"[dim]{stage.side}[/]", escape(stage.description), f"{stage.elapsed:6.1f} s", escape(stage.note)
            )
        return Group(table)
