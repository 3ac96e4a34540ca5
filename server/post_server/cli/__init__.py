"""The provider's commands of ``post``. They act on this machine's database and blob store, not over HTTP.

Heavy modules are imported when a command runs, so that ``post --help`` is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from post_server.cli.add import datasets, models
from post_server.cli.admin import admin
from post_server.cli.keys import keys

_PANEL = "Provider"


def register(app: typer.Typer) -> None:
    """Add the provider's commands."""
    for name, group in (("model", models), ("dataset", datasets), ("key", keys), ("admin", admin)):
        app.add_typer(group, name=name, rich_help_panel=_PANEL)
    for name, command in (("serve", serve), ("worker", worker), ("predictor", predictor)):
        app.command(name, rich_help_panel=_PANEL)(command)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of the embedded services.")] = None,
) -> None:
    """Run everything on this machine: the API, a worker, a predictor and an embedded broker."""
    from post_server.serve import main
    from post_server.settings import settings_with

    options: dict[str, Any] = {"host": host, "port": port, "home": home}
    raise typer.Exit(main(settings_with(**{name: value for name, value in options.items() if value is not None})))


def worker() -> None:
    """Run one worker for jobs. Start any number of them, on any host that reaches the same services."""
    from post_server.settings import get_settings
    from post_server.worker import main

    raise typer.Exit(main(get_settings()))


def predictor() -> None:
    """Run one predictor, which serves the target models."""
    from post_server.predictor import main
    from post_server.settings import get_settings

    raise typer.Exit(main(get_settings()))
