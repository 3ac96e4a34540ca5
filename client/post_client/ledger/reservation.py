"""A run charged by the ledger, and the lock held while it is running."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from post_client.ledger.budget import Charge
from post_client.privacy.randomness import trial_key
from post_shared.data.rows import Row


@dataclass(frozen=True)
class Run:
    """A charged run. Its randomness comes from ``key``, which the ledger deletes when the run is finished."""

    id: int
    key: bytes = field(repr=False)
    resumed: bool
    """The same run was started before: it is resumed and nothing more is charged."""

    @property
    def name(self) -> str:
        """A unique name that doesn't reveal the key."""
        return hashlib.sha256(b"name/" + self.key).hexdigest()

    def trial(self, number: int) -> Run:
        """One of several runs under this reservation, with its own randomness."""
        return Run(self.id, trial_key(self.key, number), self.resumed)


class Reserve(Protocol):
    """Charges ``charge`` to ``rows`` before they are used. ``run_id`` identifies the run in full detail."""

    def __call__(self, rows: Sequence[Row], charge: Charge, run_id: str) -> Run: ...


class RunLock:
    """A lock held by the process that executes a run; the operating system releases it when that process dies.

    Two processes on one run would use the same noise, so differences between their results would have no noise at all.
    """

    def __init__(self, ledger: Path, run: int) -> None:
        self.path = ledger.with_name(f"{ledger.name}.run-{run}")
        self._held: sqlite3.Connection | None = None

    def acquire(self) -> bool:
        """Try to take the lock; False if another process holds it."""
        connection = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            connection.close()
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                return False
            raise
        self._held = connection
        return True

    def release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def remove(self) -> None:
        """Release the lock and delete its file, once the run is finished."""
        self.release()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
