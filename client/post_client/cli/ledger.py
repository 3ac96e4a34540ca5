"""``post ledger`` and ``post epsilon``: what runs on the same rows have spent, and what one more would add."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from post_client.cli.console import out, print_facts, usage_error
from post_shared.terminal import AsJson, print_json, print_table

if TYPE_CHECKING:
    from post_client.ledger import Account, Charge, Ledger
    from post_client.privacy import PrivacyPlan
    from post_shared.data import Row

LedgerPath = Annotated[
    Path | None, typer.Option("--ledger", help="The privacy ledger; by default POST_LEDGER or the user's own.")
]
UserColumn = Annotated[
    str | None, typer.Option("--user-column", help="Column that names the user of a row: the unit is then a user.")
]
TextColumn = Annotated[str, typer.Option("--text-column", help="Name of the text column.")]


def open_ledger(path: Path | None) -> Ledger:
    """The ledger that the option or the environment names."""
    from post_client.ledger import Ledger, default_path

    return Ledger(path or default_path())


def ledger(
    data: Annotated[Path | None, typer.Option(help="Private rows: only their account.")] = None,
    cap: Annotated[
        float | None, typer.Option(help="With --data: set or raise the cap on its epsilon; inf takes it away.")
    ] = None,
    text_column: TextColumn = "text",
    user_column: UserColumn = None,
    ledger: LedgerPath = None,
    json: AsJson = False,
) -> None:
    """Show what the runs on each data set have spent together. It is read on this machine and sent nowhere."""
    if cap is not None and data is None:
        usage_error("--cap goes with --data: a cap belongs to a data set.")
    with open_ledger(ledger) as book:
        if data is None:
            accounts = book.accounts()
        else:
            rows, unit = _rows(data, text_column, user_column), "row" if user_column is None else "user"
            if cap is not None:
                book.set_cap(rows, unit, None if math.isinf(cap) else cap, name=data.name)  # type: ignore[arg-type]
            found = book.account(rows, unit)  # type: ignore[arg-type]
            accounts = [] if found is None else [found]
    if json:
        print_json([account.document() for account in accounts])
        return
    if not accounts:
        out.print("The ledger has no run on that." if data else "The ledger is empty.")
    for account in accounts:
        _show(account)


def epsilon(
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
    rows = None if data is None else _rows(data, text_column, user_column)
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
    from post_client.tuning import PRIVATE

    count, size = steps or PRIVATE.steps, batch_size or PRIVATE.batch_size
    if epsilon is not None:
        config = PrivacyConfig(epsilon=epsilon, delta=delta, trials=trials)
        plan: PrivacyPlan = config.plan(units, batch_size=size, steps=count)
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


def _rows(data: Path, text_column: str, user_column: str | None) -> list[Row]:
    from post_shared.data import read_rows

    return read_rows(data, text_column=text_column, label_column=None, user_column=user_column)


def _count(rows: list[Row], user_column: str | None) -> int:
    return len(rows) if user_column is None else len({row.user for row in rows})


def _value(epsilon: float) -> float | None:
    return round(epsilon, 4) if math.isfinite(epsilon) else None


def _show(account: Account) -> None:
    units = f"{account.rows} rows" if account.unit == "row" else f"{account.units} users, {account.rows} rows"
    cap = "no cap" if account.cap is None else f"cap {account.cap:g}"
    spent = account.spent.words() if account.spent.runs else "nothing spent"
    out.print(f"[bold]{escape(account.name or 'data set')}[/] {account.id} ({units}): {escape(spent)}, {cap}")
    if account.shared:
        out.print(f"  shares {account.unit}s with: {escape(', '.join(account.shared))}; those runs are counted in")
    table = Table.grid(padding=(0, 2))
    for run in account.runs:
        m = run.charge.mechanism
        how = "without privacy" if m is None else f"σ {m.noise_multiplier:.4f}  q {m.rate:.5g}  {m.steps} steps"
        alone = "no bound" if m is None else f"ε {run.charge.epsilon:.3f} at δ {run.charge.delta:g}"
        table.add_row(f"  run {run.id}", run.started, run.state, alone, how)
    print_table(table, out)
