"""The privacy ledger: the budget that all runs on the same private rows spend together. It never leaves the machine.

with Ledger(default_path()) as ledger:
    result = tune(student, task, rows, config, privacy=PrivacyConfig(epsilon=3), reserve=ledger.reserve)
    keep(result.prompt)
    ledger.finish(result.run)

A run is charged before its first step and stays charged if it is interrupted. Until it is finished, a run with the same
id draws the same batches and noise, so restarting it costs nothing. After that, it is a new run.
"""

from __future__ import annotations

from post_client.ledger.budget import Charge, Total
from post_client.ledger.ledger import Account, Ledger, RunRecord
from post_client.ledger.reservation import Reserve, Run
from post_client.ledger.store import LEDGER_VARIABLE, default_path

__all__ = [
    "LEDGER_VARIABLE",
    "Account",
    "Charge",
    "Ledger",
    "Reserve",
    "Run",
    "RunRecord",
    "Total",
    "default_path",
]
