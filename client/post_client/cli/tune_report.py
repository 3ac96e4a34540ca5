"""What ``post tune`` says at its end: the statement, the trials, and what the ledger adds up to."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from post_client.console import out
from post_shared.cli.output import print_json

if TYPE_CHECKING:
    from post_client.ledger import Account
    from post_client.tuning.search import Trial
    from post_client.tuning.tune import TuneResult

NO_GUARANTEE = (
    "NO PRIVACY GUARANTEE: this prompt is tuned without differential privacy. Whoever sees it may learn which "
    "rows it was tuned on."
)


def report_result(
    result: TuneResult,
    digest: str,
    to: Path,
    size: int,
    account: Account | None,
    trials: Sequence[Trial],
    json: bool,
) -> None:
    """For people, or as one JSON document. For the owner's eyes: it gives rows and scores away."""
    if json:
        about = None if result.statement is None else json_module.loads(result.statement.json())
        facts = {"file": str(to), "bytes": size, "model_hash": digest, "length": result.prompt.length}
        tried = [{"learning_rate": trial.learning_rate, "score": trial.score} for trial in trials]
        spent = None if account is None else account.document()["spent"]
        run = None if result.run is None else {"id": result.run.id, "resumed": result.run.resumed}
        print_json(facts | {"statement": about, "trials": tried, "run": run, "spent": spent})
        return
    out.print(escape(result.statement.words()) if result.statement else NO_GUARANTEE)
    for trial in trials:
        out.print(f"Learning rate {trial.learning_rate:.4g}: log-probability {trial.score:.4f} on the public rows")
    if account is not None:
        out.print(f"\nLedger: {escape(account.spent.in_runs())} for a {account.unit} of {escape(account.name)}.")
    out.print(f"\n{to} ({size:,} bytes). Send it: post push {to}", markup=False)
