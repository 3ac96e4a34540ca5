"""``post distil``: distil a student at the provider."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from post_client.console import Url, connect, follow, out, usage_error
from post_shared.cli.output import AsJson, print_json


def distil(
    target: Annotated[str, typer.Option("--target", help="Name or id of the target model.")],
    corpus: Annotated[
        list[str], typer.Option("--corpus", help="Name or id of a public dataset; repeat for several datasets.")
    ],
    name: Annotated[str, typer.Option("--name", help="Name of the new student.")],
    keep_layers: Annotated[
        str | None, typer.Option(help="Number of layers to keep (default: 8), or their indices, such as 0,1,28,29.")
    ] = None,
    layer_pattern: Annotated[
        str | None, typer.Option(help="Which layers to keep, given their number: ends, even, front or search.")
    ] = None,
    student_init: Annotated[str | None, typer.Option(help="least_squares (closed form) or copy.")] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            help="Wrap short paragraphs in this template, such as '{text}, it was'; repeat for several templates.",
        ),
    ] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after this many minutes.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps.")] = None,
    early_stopping: Annotated[bool, typer.Option(help="Stop when the loss no longer falls.")] = False,
    freeze_head: Annotated[
        bool | None,
        typer.Option("--freeze-head/--train-head", help="Whether to keep the target's LM head; default: frozen."),
    ] = None,
    freeze_embeddings: Annotated[
        bool | None,
        typer.Option(
            "--freeze-embeddings/--train-embeddings",
            help="Whether to keep the target's embeddings; default: frozen.",
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate, after the warm-up.")] = None,
    alignment: Annotated[
        float | None, typer.Option(min=0, help="Weight of the loss that aligns the inner hidden states.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=32, help="Tokens per step.")] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(min=1, help="Micro-batches per step; default: as few as memory allows.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(min=8, help="Tokens per sequence.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed for the order of the text.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the job ends.")] = True,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Distil a target model into a student (provider). Prints the student's id."""
    if max_minutes is None and steps is None:
        usage_error("Give --max-minutes, --steps or both.")
    options: dict[str, Any] = {
        "keep_layers": None if keep_layers is None else _layers(keep_layers),
        "layer_pattern": layer_pattern,
        "student_init": student_init,
        "templates": template or None,
        "max_minutes": max_minutes,
        "steps": steps,
        "early_stopping": early_stopping or None,
        "freeze_head": freeze_head,
        "freeze_embeddings": freeze_embeddings,
        "learning_rate": learning_rate,
        "alignment": alignment,
        "batch_tokens": batch_tokens,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    options = {key: value for key, value in options.items() if value is not None}
    with connect(url) as client:
        job = client.distillations.create(target=target, name=name, corpus=corpus, **options)
        if wait:
            follow(job)
    if json:
        print_json(job.document.model_dump(mode="json"))
    else:
        out.print(job.result["model_id"] if wait else job.id)


def _layers(text: str) -> list[int] | int:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        usage_error(f"--keep-layers takes a number, or layer indices such as 0,1,28,29; not {text!r}.")
    return numbers if "," in text else numbers[0]
