"""``post demo``: the whole method on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    results: Annotated[Path | None, typer.Option("--results", help="Write the figures to this JSON file.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Write the figure to this PNG file.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Smoke test with a tiny random model; no download.")] = False,
    upper_bound: Annotated[
        bool, typer.Option("--upper-bound", help="Also tune on the target model, which a data owner can't do.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed for rows, prompts and batch order.")] = 0,
    max_minutes: Annotated[float | None, typer.Option(help="Time limit for distillation.")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of the run; default: a temporary one.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder of the run.")] = False,
) -> None:
    """Run the whole method on this machine, over HTTP: distil, pull, tune, push, transfer, predict."""
    from post_client.demo.journey import run_demo
    from post_client.demo.settings import demo_settings

    settings = demo_settings(fast=fast, seed=seed, minutes=max_minutes, upper_bound=upper_bound)
    run_demo(settings, results_file=results, picture_file=picture, home=home, keep=keep)
