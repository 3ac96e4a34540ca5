"""``post demo``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    results: Annotated[Path | None, typer.Option("--results", help="Write the figures to this JSON file.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Where to save the picture.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A smoke run: a tiny made-up model, no download.")] = False,
    upper_bound: Annotated[
        bool, typer.Option("--upper-bound", help="Also tune on the large model itself, which nobody may do in reality.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Draws the rows, the prompts and the order of the batches.")] = 0,
    max_minutes: Annotated[float | None, typer.Option(help="How long to distil.")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of the run; by default a temporary one.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep that folder.")] = False,
) -> None:
    """The whole journey on this machine, over HTTP: distil, pull, tune, push, transfer, predict."""
    from post_client.demo.journey import run_demo
    from post_client.demo.settings import demo_settings

    settings = demo_settings(fast=fast, seed=seed, minutes=max_minutes, upper_bound=upper_bound)
    run_demo(settings, results_file=results, picture_file=picture, home=home, keep=keep)
