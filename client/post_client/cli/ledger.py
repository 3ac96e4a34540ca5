"""``post ledger``: the privacy budget that all runs on the same rows have spent together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from post_client.console import out, usage_error
from post_shared.cli.output import AsJson, print_json, print_table

if TYPE_CHECKING:
    from post_client.ledger import Account, Ledger
    from post_shared.data.rows import Row

LedgerPath = Annotated[
    Path | None, typer.Option("--ledger", help="Privacy ledger file; default: POST_LEDGER or one in your data folder.")
]
UserColumn = Annotated[
    str | None, typer.Option("--user-column", help="Column with each row's user; protects users instead of rows.")
]
TextColumn = Annotated[str, typer.Option("--text-column", help="Name of the text column.")]


def open_ledger(path: Path | None) -> Ledger:
    """Open the ledger given by ``--ledger`` or the environment."""
    from post_client.ledger import Ledger, default_path

    return Ledger(path or default_path())


def ledger(
    data: Annotated[Path | None, typer.Option(help="Show only the account of these private rows.")] = None,
    epsilon_cap: Annotated[
        float | None, typer.Option(help="With --data: set, raise or (with inf) remove the cap on epsilon.")
    ] = None,
    text_column: TextColumn = "text",
    user_column: UserColumn = None,
    ledger: LedgerPath = None,
    json: AsJson = False,
) -> None:
    """Show the privacy budget that the runs on each data set have spent. Local only; nothing is sent."""
    if epsilon_cap is not None and data is None:
        usage_error("--epsilon-cap needs --data: a cap belongs to a data set.")
    with open_ledger(ledger) as privacy_ledger:
        if data is None:
            accounts = privacy_ledger.accounts()
        else:
            rows, unit = private_rows(data, text_column, user_column), "row" if user_column is None else "user"
            if epsilon_cap is not None:
                new_cap = None if math.isinf(epsilon_cap) else epsilon_cap
                privacy_ledger.set_epsilon_cap(rows, unit, new_cap, name=data.name)  # type: ignore[arg-type]
            account = privacy_ledger.account(rows, unit)  # type: ignore[arg-type]
            accounts = [] if account is None else [account]
    if json:
        print_json([account.document() for account in accounts])
        return
    if not accounts:
        out.print("The ledger has no run on this data." if data else "The ledger is empty.")
    for account in accounts:
        _show(account)


def private_rows(data: Path, text_column: str, user_column: str | None) -> list[Row]:
    """Read rows without labels, for their account."""
    from post_shared.data.rows import read_rows

    return read_rows(data, text_column=text_column, label_column=None, user_column=user_column)


def _show(account: Account) -> None:
    units = f"{account.rows} rows" if account.unit == "row" else f"{account.units} users, {account.rows} rows"
    epsilon_cap = "no cap" if account.epsilon_cap is None else f"cap {account.epsilon_cap:g}"
    spent = account.spent.words() if account.spent.runs else "nothing spent"
    out.print(f"[bold]{escape(account.name or 'data set')}[/] {account.id} ({units}): {escape(spent)}, {epsilon_cap}")
    if account.shared:
        out.print(f"  shares {account.unit}s with: {escape(', '.join(account.shared))}; their runs are included")
    table = Table.grid(padding=(0, 2))
    for run in account.runs:
        m = run.charge.mechanism
        details = "without privacy" if m is None else f"σ {m.noise_multiplier:.4f}  q {m.rate:.5g}  {m.steps} steps"
        run_epsilon = "no bound" if m is None else f"ε {run.charge.epsilon:.3f} at δ {run.charge.delta:g}"
        table.add_row(f"  run {run.id}", run.started, run.state, run_epsilon, details)
    print_table(table, out)
