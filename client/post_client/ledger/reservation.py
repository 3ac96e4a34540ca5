"""A run that the ledger has charged, and the lock that says that it is under way."""

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
    """A reserved run. Its randomness comes from ``key``, which the ledger destroys when the run is finished."""

    id: int
    key: bytes = field(repr=False)
    resumed: bool
    """It was begun before, by the same work: it is gone on with, and nothing more is charged."""

    @property
    def name(self) -> str:
        """Tells this run from every other one, and its key to nobody."""
        return hashlib.sha256(b"name/" + self.key).hexdigest()

    def trial(self, number: int) -> Run:
        """One of several runs under this reservation, with randomness of its own."""
        return Run(self.id, trial_key(self.key, number), self.resumed)


class Reserve(Protocol):
    """Charges ``charge`` to ``rows`` before they are used. ``work`` names what will be done, to the last number."""

    def __call__(self, rows: Sequence[Row], charge: Charge, run_id: str) -> Run: ...


class RunLock:
    """Held by the process that works on a run; the operating system lets go of it when that process dies.

    Two processes on one run would use the same noise, and the rounding between their results would have none.
    """

    def __init__(self, ledger: Path, run: int) -> None:
        self.path = ledger.with_name(f"{ledger.name}.run-{run}")
        self._held: sqlite3.Connection | None = None

    def acquire(self) -> bool:
        """Whether it was free, and is now held."""
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
        """After the run is finished: nobody will look for the lock again."""
        self.release()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
