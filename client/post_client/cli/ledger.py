"""``post ledger`` and ``post epsilon``: what runs on the same rows have spent, and what one more would add."""

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
    epsilon_cap: Annotated[
        float | None, typer.Option(help="With --data: set or raise the cap on its epsilon; inf takes it away.")
    ] = None,
    text_column: TextColumn = "text",
    user_column: UserColumn = None,
    ledger: LedgerPath = None,
    json: AsJson = False,
) -> None:
    """Show what the runs on each data set have spent together. It is read on this machine and sent nowhere."""
    if epsilon_cap is not None and data is None:
        usage_error("--cap goes with --data: a cap belongs to a data set.")
    with open_ledger(ledger) as book:
        if data is None:
            accounts = book.accounts()
        else:
            rows, unit = private_rows(data, text_column, user_column), "row" if user_column is None else "user"
            if epsilon_cap is not None:
                book.set_epsilon_cap(rows, unit, None if math.isinf(epsilon_cap) else epsilon_cap, name=data.name)  # type: ignore[arg-type]
            found = book.account(rows, unit)  # type: ignore[arg-type]
            accounts = [] if found is None else [found]
    if json:
        print_json([account.document() for account in accounts])
        return
    if not accounts:
        out.print("The ledger has no run on that." if data else "The ledger is empty.")
    for account in accounts:
        _show(account)


def private_rows(data: Path, text_column: str, user_column: str | None) -> list[Row]:
    from post_shared.data.rows import read_rows

    return read_rows(data, text_column=text_column, label_column=None, user_column=user_column)


def _show(account: Account) -> None:
    units = f"{account.rows} rows" if account.unit == "row" else f"{account.units} users, {account.rows} rows"
    epsilon_cap = "no cap" if account.epsilon_cap is None else f"cap {account.epsilon_cap:g}"
    spent = account.spent.words() if account.spent.runs else "nothing spent"
    out.print(f"[bold]{escape(account.name or 'data set')}[/] {account.id} ({units}): {escape(spent)}, {epsilon_cap}")
    if account.shared:
        out.print(f"  shares {account.unit}s with: {escape(', '.join(account.shared))}; those runs are counted in")
    table = Table.grid(padding=(0, 2))
    for run in account.runs:
        m = run.charge.mechanism
        how = "without privacy" if m is None else f"σ {m.noise_multiplier:.4f}  q {m.rate:.5g}  {m.steps} steps"
        alone = "no bound" if m is None else f"ε {run.charge.epsilon:.3f} at δ {run.charge.delta:g}"
        table.add_row(f"  run {run.id}", run.started, run.state, alone, how)
    print_table(table, out)
