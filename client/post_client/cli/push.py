"""``post push``: upload a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from post_client.console import Url, confirm, connect, err, naming, out, read_file, write_file
from post_shared.cli.output import AsJson, print_json, print_table


def push(
    file: Annotated[Path, typer.Argument(help="The prompt file.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Send without asking for confirmation.")] = False,
    dry_run: Annotated[
        Path | None,
        typer.Option("--dry-run", help="Send nothing; write the exact request to this file (- for stdout)."),
    ] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Upload a prompt to the provider, after showing exactly what will leave this machine."""
    from post_client.outbound import build_upload, describe
    from post_shared.files.prompt_file import read_prompt

    content = read_file(file)
    with naming(file):
        request = build_upload(read_prompt(content))
    facts = describe(request)
    if dry_run is not None:
        _write_request(dry_run, request.to_bytes())
        written = "" if str(dry_run) == "-" else f" {escape(str(dry_run))} contains the request."
        err.print(
            f"Nothing was sent.{written} Sending adds the address (Host) and your key (Authorization), nothing else."
        )
        return
    if not json:
        _show(facts)
    if not yes and not (answer := confirm("Send this?", default=False)):
        err.print(
            "Nothing was sent."
            if answer is False
            else "Nothing was sent: there was no answer. Use --yes to send without asking."
        )
        raise typer.Exit(1)
    with connect(url) as client:
        prompt = client.prompts.upload(request)
    if json:
        print_json({"sent": facts, "prompt": prompt.model_dump(mode="json")})
    else:
        out.print(prompt.id)


def _write_request(path: Path, data: bytes) -> None:
    if str(path) == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        write_file(path, data)


def _show(facts: dict[str, Any]) -> None:
    err.print("[bold]What will leave this machine:[/]")
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if name not in ("epsilon", "delta"):
            table.add_row(name, escape(str(value)))
    if facts["epsilon"] is None:
        table.add_row("privacy", "[bold yellow]no guarantee: tuned without differential privacy[/]")
    else:
        table.add_row("privacy", f"({facts['epsilon']:g}, {facts['delta']:g})-differential privacy")
    print_table(table, err)
    err.print("Nothing else: no rows, no row count, no accuracy, no loss, no timestamp, no file name.")
