"""The ledger: what all runs on the same private rows have spent together. It stays on the data owner's machine.

with Ledger(default_path()) as ledger:
    result = tune(student, task, rows, config, privacy=PrivacyConfig(epsilon=3), reserve=ledger.reserve)
    keep(result.prompt)
    ledger.finish(result.run)

A run is charged before its first step and stays charged if it dies. Until it is finished, the same work draws the same
batches and the same noise, so starting it again is the same run and costs nothing; after that it is a new one.
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
