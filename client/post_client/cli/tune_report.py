"""The output of ``post tune``: the privacy statement, the trials and the ledger's total."""

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
    "NO PRIVACY GUARANTEE: this prompt is tuned without differential privacy. Anyone who sees it may learn which "
    "rows it was tuned on."
)


def report_result(
    result: TuneResult,
    digest: str,
    output: Path,
    size: int,
    account: Account | None,
    trials: Sequence[Trial],
    json: bool,
) -> None:
    """Print the result as text or JSON. It is for the data owner only: it reveals row counts and scores."""
    if json:
        statement = None if result.statement is None else json_module.loads(result.statement.json())
        facts = {"file": str(output), "bytes": size, "model_hash": digest, "length": result.prompt.length}
        scores = [{"learning_rate": trial.learning_rate, "score": trial.score} for trial in trials]
        spent = None if account is None else account.document()["spent"]
        run = None if result.run is None else {"id": result.run.id, "resumed": result.run.resumed}
        print_json(facts | {"statement": statement, "trials": scores, "run": run, "spent": spent})
        return
    out.print(escape(result.statement.words()) if result.statement else NO_GUARANTEE)
    for trial in trials:
        out.print(f"Learning rate {trial.learning_rate:.4g}: log-probability {trial.score:.4f} on the public rows")
    if account is not None:
        out.print(f"\nLedger: {escape(account.spent.in_runs())} for a {account.unit} of {escape(account.name)}.")
    out.print(f"\nWrote {output} ({size:,} bytes). To send it: post push {output}", markup=False)
