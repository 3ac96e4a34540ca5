"""Fills the tables of the reference pages from the code: ``.venv/bin/python docs/tables.py`` (or ``make docs``).

A table stands between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``. A test keeps the pages in step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent


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

    from post_shared.cli import build_app

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


def main() -> None:
    for name, (file, make) in TABLES.items():
        path = DOCS / file
        path.write_text(filled(path.read_text("utf-8"), name, make()), encoding="utf-8")


if __name__ == "__main__":
    main()
