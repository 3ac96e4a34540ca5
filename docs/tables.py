"""Fills the tables of the pages: ``.venv/bin/python docs/tables.py`` (or ``make docs``).

A table stands between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``. Those of the reference pages come from the
code. Those named ``results/NAME`` come from ``benchmarks/results/NAME.json``, so that no measured figure is typed by
hand. A test keeps the pages in step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
RESULTS_PAGES = ("results.md", "../README.md")
"""Pages that show measured figures, relative to the folder of the documentation."""
NOT_RECORDED = "not recorded"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def settings_table() -> str:
    """Every setting of the provider's side."""
    from post_server.settings import Settings

    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default_factory or field.default in ("", None) else f"`{field.default}`"
        rows.append([f"`POST_{name.upper()}`", default, field.description or ""])
    return _table(["variable", "default", "meaning"], rows)


def errors_table() -> str:
    """Every error code, in the order of the tree."""
    from post_shared.errors import PostError

    def tree(base: type[PostError]) -> Iterator[type[PostError]]:
        yield base
        for child in base.__subclasses__():
            if child.__module__ == PostError.__module__:
                yield from tree(child)

    rows = [[f"`{e.code}`", str(e.status), f"`{e.__name__}`", e.title] for e in tree(PostError)]
    return _table(["code", "status", "class in `post_shared.errors`", "meaning"], rows)


def endpoints_table() -> str:
    """Every operation of the OpenAPI document."""
    from post_server.api.app import create_app

    rows = []
    for path, operations in create_app().openapi()["paths"].items():
        for method, operation in operations.items():
            summary = operation.get("description") or operation.get("summary", "")
            rows.append([f"`{method.upper()} {path}`", " ".join(summary.split("\n\n")[0].split())])
    return _table(["operation", "what it does"], rows)


def commands_table() -> str:
    """Every command of ``post`` with its arguments and options."""
    import typer

    from post_shared.cli.app import build_app

    return "\n\n".join(_command_pages("post", typer.main.get_command(build_app()))).strip()


def canaries_table() -> str:
    """The largest ε that a number of canaries can show, by the bound itself."""
    from post_client.audit import strongest

    deltas = (1e-5, 1e-6, 1e-8)
    rows = [
        [f"{count:,}", *(f"{strongest(count, delta):.2f}" for delta in deltas)]
        for count in (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
    ]
    return _table(["canaries", *(f"δ = {delta:g}" for delta in deltas)], rows)


class Result(NamedTuple):
    """One measured table and the facts without which its figures mean nothing."""

    title: str
    command: str
    """What was run, as it was typed then; several commands stand on lines of their own."""
    commit: str
    date: str
    machine: str
    note: str
    """One sentence on spread and limits."""
    columns: list[str]
    rows: list[list[str | None]]

    @classmethod
    def read(cls, path: Path) -> Result:
        """Numbers stay as they are written, so that 0.840 keeps its last digit.

        Raises:
            ValueError: a member is missing, unknown or empty, or a row has other cells than there are columns.
        """
        document = json.loads(path.read_text("utf-8"), parse_float=str, parse_int=str)
        if tuple(document) != cls._fields:
            raise ValueError(f"{path.name} has {', '.join(document)}; it must have {', '.join(cls._fields)}")
        empty = [name for name in cls._fields if not document[name]]
        if empty:
            raise ValueError(f"{path.name}: {', '.join(empty)} may not be empty; write {NOT_RECORDED!r}")
        if any(len(row) != len(document["columns"]) for row in document["rows"]):
            raise ValueError(f"{path.name}: every row has {len(document['columns'])} cells")
        return cls(**document)

    def markdown(self) -> str:
        """Title, table, the sentence on spread, and where the figures come from."""
        table = _table(self.columns, [["" if cell is None else cell for cell in row] for row in self.rows])
        commands = [line if line.startswith(NOT_RECORDED) else f"`{line}`" for line in self.command.splitlines()]
        source = [
            f"Command: {', '.join(commands)}",
            f"commit: {self.commit}",
            f"date: {self.date}",
            f"machine: {self.machine}",
        ]
        return f"**{self.title}**\n\n{table}\n\n{self.note}<br>\n<sub>{' · '.join(source)}</sub>"


def results_table(name: str) -> str:
    """The measured table ``results/NAME``."""
    return Result.read(RESULTS / f"{name}.json").markdown()


def results_blocks() -> Iterator[tuple[str, str]]:
    """(page, name) of every measured table that a page has a place for."""
    for page in RESULTS_PAGES:
        text = (DOCS / page).read_text("utf-8")
        yield from ((page, name) for name in re.findall(r"<!-- begin: results/([a-z0-9-]+) -->", text))


def _command_pages(name: str, command: Any) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if children:
        for child in children.values():
            if not child.hidden:
                yield from _command_pages(f"{name} {child.name}", child)
        return
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        rows.append([_spelling(parameter), _plain(getattr(parameter, "help", None)), _default(parameter)])
    table = _table(["argument or option", "meaning", "default"], rows) if rows else "No arguments."
    yield f"### `{name}`\n{_plain(command.help, lines=True)}\n\n{table}"


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = (parameter.metavar or parameter.name or "").upper().strip("[]")
        return f"`{name}`" if parameter.required else f"`[{name}]`"
    needed = " (required)" if parameter.required else ""
    return ", ".join(f"`{each}`" for each in [*parameter.opts, *parameter.secondary_opts]) + needed


def _default(parameter: Any) -> str:
    value = parameter.default
    if callable(value) or value is None or value == "" or parameter.required or type(value).__module__ != "builtins":
        return ""
    return f"`{value}`" if isinstance(value, str | int | float | bool) else ""


def _plain(text: str | None, *, lines: bool = False) -> str:
    text = re.sub(r"(?<!\\)\[/?[a-z ]*\]", "", text or "").replace("\\[", "[").replace("\b", "")
    return text.strip() if lines else " ".join(text.split())


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "settings": ("reference-settings.md", settings_table),
    "errors": ("reference-api.md", errors_table),
    "endpoints": ("reference-api.md", endpoints_table),
    "commands": ("reference-cli.md", commands_table),
    "canaries": ("howto-audit.md", canaries_table),
}


def filled(page: str, name: str, table: str) -> str:
    """The page with the table in its place."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def fill(file: str, name: str, table: str) -> None:
    """Write the table into its place on the page."""
    path = DOCS / file
    path.write_text(filled(path.read_text("utf-8"), name, table), encoding="utf-8")


def fill_results() -> None:
    """Only the measured tables: this needs none of POST's packages."""
    for file, name in list(results_blocks()):
        fill(file, f"results/{name}", results_table(name))


def main() -> None:
    fill_results()
    for name, (file, make) in TABLES.items():
        fill(file, name, make())


if __name__ == "__main__":
    main()
