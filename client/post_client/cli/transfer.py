"""``post transfer``: transfer a prompt to the target model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from post_client.console import Url, connect, err, follow, out, usage_error
from post_shared.cli.output import AsJson, print_json


def transfer(
    prompt: Annotated[str, typer.Option("--prompt", help="Id of the source prompt (printed by post push).")],
    target: Annotated[str, typer.Option("--target", help="Name or id of the target model.")],
    dataset: Annotated[str, typer.Option("--dataset", help="Name or id of a public dataset.")],
    alpha: Annotated[str | None, typer.Option(help="Weight from 0 to 1, or auto (Eq. 6).")] = None,
    method: Annotated[
        str | None, typer.Option(help="ensemble (student and target together, over classes) or paper (Eq. 3).")
    ] = None,
    prompt_init: Annotated[
        str | None,
        typer.Option(
            help="Initial prompt: instruction (text that states the task) or source. [default: depends on --method]"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Public rows per step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Initial learning rate; decays to 0. [default: depends on --prompt-init]")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="With --method paper: temperature of the teacher's outputs; above 0.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Maximum public rows to use.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest public text in tokens; the rest is cut.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed for the choice and order of the public rows.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the job ends.")] = True,
    url: Url = None,
    json: AsJson = False,
) -> None:
    """Transfer a source prompt to the target model with public text. Prints the target prompt's id."""
    options: dict[str, Any] = {
        "alpha": None if alpha is None else _alpha(alpha),
        "method": method,
        "prompt_init": prompt_init,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "temperature": temperature,
        "max_rows": max_rows,
        "max_length": max_length,
        "seed": seed,
    }
    options = {name: value for name, value in options.items() if value is not None}
    with connect(url) as client:
        job = client.transfers.create(prompt=prompt, target=target, dataset=dataset, **options)
        if wait:
            follow(job)
    if json:
        print_json(job.document.model_dump(mode="json"))
    else:
        if wait and options.get("alpha") == "auto":
            err.print(f"alpha {job.result['alpha']:g}, found by Eq. 6")
        out.print(job.result["prompt_id"] if wait else job.id)


def _alpha(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        usage_error(f"--alpha takes a number from 0 to 1, or auto; not {text!r}.")
