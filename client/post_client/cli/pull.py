"""``post pull``: download a student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from post_client.console import Url, bar, byte_column, connect, err, print_facts
from post_shared.cli.output import AsJson, print_json


def pull(
    student: Annotated[str, typer.Argument(help="Name or id of the student model.")],
    folder: Annotated[Path, typer.Option("--to", help="Target folder: new, empty, or with this same student.")],
    pin: Annotated[
        str | None, typer.Option("--hash", help="Expected model hash; a student with another hash is refused.")
    ] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Download a student model. Interrupted downloads resume; every file is verified by its hash."""
    progress_calls = 0
    with connect(url) as client, bar(f"pull {student}", byte_column()) as show:

        def progress(done: int, total: int) -> None:
            nonlocal progress_calls
            progress_calls += 1
            show(done, total, "")

        manifest = client.models.download(student, folder, pin=pin, progress=progress)
    if progress_calls == 1:  # the folder was complete; a download makes several calls
        err.print(f"{escape(str(folder))} already contains this student (verified); nothing was downloaded.")
    facts = {"name": manifest.name, "id": manifest.model_id, "hash": manifest.hash, "folder": str(folder)}
    print_json(facts) if json else print_facts(facts)
