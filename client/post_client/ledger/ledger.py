"""The ledger itself: reserve, refuse, finish, and say what was spent."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from post_client.ledger.budget import Charge, Total
from post_client.ledger.queries import (
    cap_of,
    charge_of,
    check_caps,
    checked_cap,
    enter,
    finite,
    groups,
    insert,
    lower_cap,
    now,
    one,
    unfinished,
    worst,
)
from post_client.ledger.records import records_of, salted
from post_client.ledger.reservation import Run, RunLock
from post_client.ledger.store import Store
from post_client.privacy.accounting import Unit
from post_client.privacy.randomness import new_key
from post_shared.data.rows import Row
from post_shared.errors import Conflict, NotFound


@dataclass(frozen=True)
class RunRecord:
    """One charged run."""

    id: int
    state: str
    """``running``, ``interrupted`` (charged, and free to be started again) or ``finished``."""
    started: str
    ended: str | None
    charge: Charge


@dataclass(frozen=True)
class Account:
    """What a data set has spent: the worst of its rows."""

    id: int
    name: str
    unit: Unit
    rows: int
    units: int
    epsilon_cap: float | None
    """The least cap of all data sets that share rows with it."""
    spent: Total
    runs: tuple[RunRecord, ...]
    shared: tuple[str, ...]
    """Names of other data sets that share rows (or users) with it."""

    def document(self) -> dict[str, Any]:
        """For JSON; an infinite ε is null there, and ``why`` says why."""
        members: dict[str, Any] = asdict(self)
        members["spent"]["epsilon"] = finite(self.spent.epsilon)
        for member, run in zip(members["runs"], self.runs, strict=True):
            member["charge"]["epsilon"] = finite(run.charge.epsilon)
        return members


class Ledger:
    """Opens the ledger at ``path``, and makes it if it isn't there.

    Raises:
        LedgerInvalid: it can't be read or written there, or the file is something else.
    """

    def __init__(self, path: Path) -> None:
        self._store = Store(path)
        self._salt = self._store.salt()
        self._locks: dict[int, RunLock] = {}

    def close(self) -> None:
        """Let go of the runs that are under way here; they stay charged."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- charging -------------------------------------------------------------------------------------

    def reserve(
        self, rows: Sequence[Row], charge: Charge, run_id: str, *, name: str = "", epsilon_cap: float | None = None
    ) -> Run:
        """Charge a run before it begins; on disk when this returns. A run of the same work that never ended goes on.

        ``cap`` is kept with the data set; a later one can only lower it (:meth:`set_epsilon_cap` also raises it). It stops no
        run that is charged already.

        Raises:
            BudgetExceeded: some row would get above its cap; nothing was charged.
            Conflict: another process is at this very run.
            LedgerInvalid: the charge couldn't be written.
        """
        records = records_of(rows, charge.unit, self._salt)
        secret = salted(self._salt, "work", run_id)
        with ExitStack() as undo, self._store.transaction() as connection:
            data_set = enter(connection, records, len(rows), name)
            run = unfinished(connection, data_set, secret, charge)
            if epsilon_cap is not None:
                lower_cap(connection, data_set, checked_cap(epsilon_cap))
            if run is None:
                check_caps(connection, data_set, charge, name)
                run = Run(insert(connection, data_set, secret, charge, key := new_key()), key, False)
            lock = RunLock(self._store.path, run.id)
            if run.id in self._locks or not lock.acquire():
                raise Conflict(f"run {run.id}, which is this very work, is under way in another process; let it end")
            undo.callback(lock.remove)  # should the charge not get onto the disk
            connection.execute("COMMIT")
            undo.pop_all()
            self._locks[run.id] = lock
        return run

    def finish(self, run: Run) -> None:
        """The result of ``run`` is kept: its key is destroyed, so the same work again is a new run."""
        with self._store.transaction() as connection:
            connection.execute("UPDATE runs SET key = NULL, ended = ? WHERE id = ? AND key NOT NULL", (now(), run.id))
        lock = self._locks.pop(run.id, None)
        if lock is not None:
            lock.remove()

    # --- asking ---------------------------------------------------------------------------------------

    def foresee(self, rows: Sequence[Row], charge: Charge) -> tuple[Total, Total]:
        """What the worst row has spent, and what it will have with ``charge`` too. Nothing is charged."""
        records = records_of(rows, charge.unit, self._salt)
        with self._store.transaction() as connection:
            connection.execute("SAVEPOINT question")
            data_set = enter(connection, records, len(rows), "")
            before, after = worst(connection, data_set), worst(connection, data_set, charge)
            connection.execute("ROLLBACK TO question")
        return before, after

    def account(self, rows: Sequence[Row], unit: Unit) -> Account | None:
        """The account of a data set; None if no run on it was charged and no cap set."""
        digest = records_of(rows, unit, self._salt).digest
        with self._store.transaction() as connection:
            found = connection.execute("SELECT * FROM data_sets WHERE digest = ?", (digest,)).fetchone()
            return None if found is None else self._account(connection, found)

    def accounts(self) -> list[Account]:
        """Every data set, in the order in which they came."""
        with self._store.transaction() as connection:
            every = connection.execute("SELECT * FROM data_sets ORDER BY id").fetchall()
            return [self._account(connection, each) for each in every]

    def set_epsilon_cap(self, rows: Sequence[Row], unit: Unit, epsilon_cap: float | None, *, name: str = "") -> None:
        """Set, raise or (with None) remove the cap of a data set."""
        records = records_of(rows, unit, self._salt)
        value = None if epsilon_cap is None else checked_cap(epsilon_cap)
        with self._store.transaction() as connection:
            data_set = enter(connection, records, len(rows), name)
            connection.execute("UPDATE data_sets SET cap = ? WHERE id = ?", (value, data_set))

    def run(self, number: int) -> RunRecord:
        """One run.

        Raises:
            NotFound: there is no such run.
        """
        with self._store.transaction() as connection:
            found = connection.execute("SELECT * FROM runs WHERE id = ?", (number,)).fetchone()
            if found is None:
                raise NotFound(f"the ledger has no run {number}")
            return self._record(found)

    def _account(self, connection: sqlite3.Connection, data_set: sqlite3.Row) -> Account:
        runs = connection.execute("SELECT * FROM runs WHERE data_set = ? ORDER BY id", (data_set["id"],)).fetchall()
        met = groups(connection, data_set["id"])
        others = sorted(set().union(*met) - {data_set["id"]})
        return Account(
            id=data_set["id"],
            name=data_set["name"],
            unit=data_set["unit"],
            rows=data_set["rows"],
            units=data_set["units"],
            epsilon_cap=min(
                (epsilon_cap for group in met if (epsilon_cap := cap_of(connection, group)) is not None), default=None
            ),
            spent=worst(connection, data_set["id"]),
            runs=tuple(map(self._record, runs)),
            shared=tuple(str(one(connection, "SELECT name FROM data_sets WHERE id = ?", other)) for other in others),
        )

    def _record(self, row: sqlite3.Row) -> RunRecord:
        return RunRecord(row["id"], self._state(row), row["started"], row["ended"], charge_of(row))

    def _state(self, row: sqlite3.Row) -> str:
        if row["key"] is None:
            return "finished"
        if row["id"] in self._locks:
            return "running"
        lock = RunLock(self._store.path, row["id"])
        free = lock.acquire()
        lock.release()
        return "interrupted" if free else "running"
