"""``post generate``: the target model continues a text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from post_client.console import Url, connect
from post_shared.cli.output import AsJson, print_json


def generate(
    model: Annotated[str, typer.Option("--model", help="Name or id of the target model.")],
    text: Annotated[list[str], typer.Option("--text", help="A text to continue, as it is; repeat for more.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Id of a prompt; without one the model alone.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Most tokens of an answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest that make up this share.")] = 1.0,
    n: Annotated[int, typer.Option("--n", min=1, max=128, help="Answers to each text.")] = 1,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; up to four.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same.")] = None,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Let the target model continue a text. The provider sees it.

    One answer to one text is shown as it is made; several come as JSON Lines.
    """
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "n": n}
    options |= {name: value for name, value in (("stop", stop), ("seed", seed)) if value}
    name = f"{model}:{prompt}" if prompt else model
    with connect(url) as client:
        if json or len(text) * n > 1:
            found = client.completions.create(model=name, prompt=text, **options)
            if json:
                print_json(found.model_dump(mode="json"))
                return
            for choice in found.choices:
                print_json({"text": text[choice.index // n], "answer": choice.text, "end": choice.finish_reason})
            return
        for piece in client.completions.stream(model=name, prompt=text, **options):
            for choice in piece.choices:
                typer.echo(choice.text, nl=False)
        typer.echo()
