"""``post accountant``: ε for a noise level, the noise for an ε, and what one more run would add to the ledger."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from post_client.cli.ledger import LedgerPath, TextColumn, UserColumn, open_ledger, private_rows
from post_client.console import print_facts, usage_error
from post_shared.cli.output import AsJson, print_json

if TYPE_CHECKING:
    from post_client.ledger import Charge
    from post_shared.data.rows import Row


def accountant(
    units: Annotated[int | None, typer.Option(min=1, help="Number of rows (or users).")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Instead of --units: private rows; their ledger account is shown too.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Find the noise multiplier for this budget.")] = None,
    noise: Annotated[
        float | None, typer.Option(help="Instead of --epsilon: find epsilon for this noise multiplier.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default: as in post tune.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Expected rows (or users) per step; default: as in post tune.")
    ] = None,
    delta: Annotated[float | None, typer.Option(help="Default: 1e-6.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Number of runs that share the budget.")] = 1,
    text_column: TextColumn = "text",
    user_column: UserColumn = None,
    ledger: LedgerPath = None,
    json: AsJson = False,
) -> None:
    """Compute epsilon for a noise level, or the noise for an epsilon. Nothing is trained or charged.

    With --data, also show what such a run would add to the ledger.
    """
    if (units is None) == (data is None) or (epsilon is None) == (noise is None):
        usage_error("Give either --units or --data, and either --epsilon or --noise.")
    rows = None if data is None else private_rows(data, text_column, user_column)
    facts, charge = _planned_run(
        units or _count(rows or [], user_column), epsilon, noise, delta, steps, batch_size, trials, user_column
    )
    if rows is not None:
        with open_ledger(ledger) as privacy_ledger:
            before, after = privacy_ledger.foresee(rows, charge)
        facts |= {"spent so far": _rounded(before.epsilon), "spent with this run": _rounded(after.epsilon)}
        facts |= {"at delta": after.delta, "runs so far": before.runs}
    if json:
        print_json({name.replace(" ", "_"): value for name, value in facts.items()})
    else:
        print_facts({name: "no bound" if value is None else value for name, value in facts.items()})


def _planned_run(
    units: int,
    epsilon: float | None,
    noise: float | None,
    delta: float | None,
    steps: int | None,
    batch_size: int | None,
    trials: int,
    user_column: str | None,
) -> tuple[dict[str, Any], Charge]:
    """The figures and the charge of a run, for a noise multiplier or for a budget."""
    from post_client.ledger import Charge
    from post_client.privacy import Mechanism, PrivacyConfig, PrivacyPlan, compose, default_delta
    from post_client.privacy.accounting import check_delta
    from post_shared.schemas.tuning import PRIVATE

    steps, batch_size = steps or PRIVATE.steps, batch_size or PRIVATE.batch_size
    if epsilon is not None:
        config = PrivacyConfig(epsilon=epsilon, delta=delta, trials=trials)
        plan = PrivacyPlan.make(config, units, batch_size=batch_size, steps=steps)
        mechanism = Mechanism(plan.noise_multiplier, plan.rate, steps * trials)
        spent, delta = plan.spent, plan.delta
    else:
        delta = check_delta(default_delta(units) if delta is None else delta, units)
        mechanism = Mechanism(float(noise or 0), min(1.0, batch_size / units), steps * trials)
        spent = compose([mechanism], delta)
    facts = {
        "epsilon": round(spent.epsilon, 4),
        "delta": delta,
        "accountant": spent.accountant,
        "noise multiplier": round(mechanism.noise_multiplier, 4),
        "sampling rate": round(mechanism.rate, 6),
        "steps": mechanism.steps,
        "unit": "row" if user_column is None else "user",
    }
    return facts, Charge("row" if user_column is None else "user", delta, mechanism)


def _count(rows: list[Row], user_column: str | None) -> int:
    return len(rows) if user_column is None else len({row.user for row in rows})


def _rounded(epsilon: float) -> float | None:
    return round(epsilon, 4) if math.isfinite(epsilon) else None
