"""``post accountant``: ε for given noise, noise for given ε, and what one more run would add to the ledger."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from post_client.console import print_facts, usage_error
from post_shared.cli.output import AsJson, print_json

if TYPE_CHECKING:
    from post_client.ledger import Charge
    from post_client.privacy import PrivacyPlan
    from post_shared.data.rows import Row
from post_client.cli.ledger import LedgerPath, TextColumn, UserColumn, open_ledger, private_rows


def accountant(
    units: Annotated[int | None, typer.Option(min=1, help="Number of rows (or users).")] = None,
    data: Annotated[Path | None, typer.Option(help="Instead: private rows, whose account is looked up too.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Find the noise for this budget.")] = None,
    noise: Annotated[float | None, typer.Option(help="Instead: find epsilon for this noise multiplier.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the run; by default those of post tune.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows (or users) in a step on average; by default that of post tune.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="By default chosen from the number of rows.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Runs that share the budget.")] = 1,
    text_column: TextColumn = "text",
    user_column: UserColumn = None,
    ledger: LedgerPath = None,
    json: AsJson = False,
) -> None:
    """Epsilon for given noise, noise for given epsilon, and what such a run would add. Trains and charges nothing."""
    if (units is None) == (data is None) or (epsilon is None) == (noise is None):
        usage_error("Give --units or --data, and --epsilon or --noise.")
    rows = None if data is None else private_rows(data, text_column, user_column)
    facts, charge = _foreseen(
        units or _count(rows or [], user_column), epsilon, noise, delta, steps, batch_size, trials, user_column
    )
    if rows is not None:
        with open_ledger(ledger) as book:
            before, after = book.foresee(rows, charge)
        facts |= {"spent so far": _value(before.epsilon), "spent with this run": _value(after.epsilon)}
        facts |= {"at delta": after.delta, "runs so far": before.runs}
    if json:
        print_json({name.replace(" ", "_"): value for name, value in facts.items()})
    else:
        print_facts({name: "no bound" if value is None else value for name, value in facts.items()})


def _foreseen(
    units: int,
    epsilon: float | None,
    noise: float | None,
    delta: float | None,
    steps: int | None,
    batch_size: int | None,
    trials: int,
    user_column: str | None,
) -> tuple[dict[str, Any], Charge]:
    """The numbers of a run, by the noise or by the budget."""
    from post_client.ledger import Charge
    from post_client.privacy import Mechanism, PrivacyConfig, compose, default_delta
    from post_client.privacy.accounting import check_delta
    from post_shared.schemas.tuning import PRIVATE

    count, size = steps or PRIVATE.steps, batch_size or PRIVATE.batch_size
    if epsilon is not None:
        config = PrivacyConfig(epsilon=epsilon, delta=delta, trials=trials)
        plan: PrivacyPlan = PrivacyPlan.make(config, units, batch_size=size, steps=count)
        mechanism = Mechanism(plan.noise_multiplier, plan.rate, count * trials)
        spent, chosen = plan.spent, plan.delta
    else:
        chosen = check_delta(default_delta(units) if delta is None else delta, units)
        mechanism = Mechanism(float(noise or 0), min(1.0, size / units), count * trials)
        spent = compose([mechanism], chosen)
    facts = {
        "epsilon": round(spent.epsilon, 4),
        "delta": chosen,
        "accountant": spent.accountant,
        "noise multiplier": round(mechanism.noise_multiplier, 4),
        "sampling rate": round(mechanism.rate, 6),
        "steps": mechanism.steps,
        "unit": "row" if user_column is None else "user",
    }
    return facts, Charge("row" if user_column is None else "user", chosen, mechanism)


def _count(rows: list[Row], user_column: str | None) -> int:
    return len(rows) if user_column is None else len({row.user for row in rows})


def _value(epsilon: float) -> float | None:
    return round(epsilon, 4) if math.isfinite(epsilon) else None
