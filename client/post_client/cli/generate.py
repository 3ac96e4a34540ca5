"""``post generate``: continue a text with the target model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from post_client.console import Url, connect
from post_shared.cli.output import AsJson, print_json


def generate(
    model: Annotated[str, typer.Option("--model", help="Name or id of the target model.")],
    text: Annotated[list[str], typer.Option("--text", help="Text to continue; repeat for several texts.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Id of a prompt; default: the model without a prompt.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Maximum tokens per completion.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Sampling temperature; 0 is greedy decoding.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling: cumulative probability to keep.")] = 1.0,
    n: Annotated[int, typer.Option("--n", min=1, max=128, help="Completions per text.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Stop before this text; repeat for up to four.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Continue a text with the target model. The provider sees the text.

    A single completion is streamed; several are printed as JSON Lines.
    """
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "n": n}
    options |= {name: value for name, value in (("stop", stop), ("seed", seed)) if value}
    name = f"{model}:{prompt}" if prompt else model
    with connect(url) as client:
        if json or len(text) * n > 1:
            completion = client.completions.create(model=name, prompt=text, **options)
            if json:
                print_json(completion.model_dump(mode="json"))
                return
            for choice in completion.choices:
                print_json({"text": text[choice.index // n], "answer": choice.text, "end": choice.finish_reason})
            return
        for chunk in client.completions.stream(model=name, prompt=text, **options):
            for choice in chunk.choices:
                typer.echo(choice.text, nl=False)
        typer.echo()
