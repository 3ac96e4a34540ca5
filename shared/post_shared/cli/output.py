"""Standard output of the commands of both sides: tables, and JSON for programs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output instead of text.")]

_WIDE = 10_000


def print_json(document: Any) -> None:
    """Print one JSON document on one line."""
    typer.echo(json.dumps(document, ensure_ascii=False, default=str))


def plain_table(*columns: str) -> Table:
    """A table without lines, to be filled with ``add_row``. In a narrow terminal, cells are wrapped, never cut."""
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table. In a file or a pipe, which have no width, every row is one line, however long."""
    console = console or Console()
    if console.is_terminal:
        console.print(table)
        return
    width, console.width = console.width, _WIDE
    try:
        console.print(table)
    finally:
        console.width = width
