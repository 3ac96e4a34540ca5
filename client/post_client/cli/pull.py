"""``post pull``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from post_client.console import Url, bar, byte_column, connect, err, print_facts
from post_shared.cli.output import AsJson, print_json


def pull(
    student: Annotated[str, typer.Argument(help="Name or id of the student model.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to be: new, empty, or one with this very student.")],
    pin: Annotated[
        str | None, typer.Option("--hash", help="The hash that you know; a student with another is refused.")
    ] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Fetch a student model: resumed where it stopped, every byte checked."""
    news = 0
    with connect(url) as client, bar(f"pull {student}", byte_column()) as show:

        def progress(done: int, total: int) -> None:
            nonlocal news
            news += 1
            show(done, total, "")

        manifest = client.models.download(student, to, pin=pin, progress=progress)
    if news == 1:  # all at once, and with no byte before
        err.print(f"{escape(str(to))} holds this student already, every byte checked; nothing was fetched.")
    facts = {"name": manifest.name, "id": manifest.model_id, "hash": manifest.hash, "folder": str(to)}
    print_json(facts) if json else print_facts(facts)
