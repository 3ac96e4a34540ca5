"""Tables and JSON on standard output: nothing is cut, in a terminal or a file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from post_shared.cli.output import plain_table, print_json, print_table

LONG = "model_" + "0123456789" * 12


def printed(**options: object) -> str:
    table = plain_table("id", "name", "made")
    table.add_row(LONG, "a name", "2026-01-31 08:00")
    file = io.StringIO()
    print_table(table, Console(file=file, **options))  # type: ignore[arg-type]
    return file.getvalue()


def test_without_a_terminal_every_row_is_one_line() -> None:
    _, row = printed().splitlines()
    assert row.split("  ") == [LONG, "a name", "2026-01-31 08:00"]


def test_a_narrow_terminal_wraps_and_cuts_nothing() -> None:
    text = printed(force_terminal=True, width=60, no_color=True)
    assert "…" not in text
    first_column = "".join(line.split("  ")[0].strip() for line in text.splitlines()[1:])
    assert LONG in first_column


def test_a_given_console_prints_and_keeps_its_width() -> None:
    console = Console(file=io.StringIO(), record=True, width=60)
    print_table(plain_table("id"), console)
    assert console.width == 60
    assert "id" in console.export_text()


def test_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_json([{"word": "schön"}])
    assert capsys.readouterr().out == '[{"word": "schön"}]\n'
