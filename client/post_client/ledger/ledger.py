"""The ledger: charge runs, refuse those above a cap, finish runs, and report what was spent."""

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
    find_or_insert,
    finite,
    groups,
    insert_run,
    largest_total,
    lower_cap,
    now,
    one,
    renew,
    unfinished,
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
    """``running``, ``interrupted`` (charged and can be resumed) or ``finished``."""
    started: str
    ended: str | None
    charge: Charge


@dataclass(frozen=True)
class Account:
    """What a data set has spent: the largest total of its rows."""

    id: int
    name: str
    unit: Unit
    rows: int
    units: int
    epsilon_cap: float | None
    """The smallest cap of all data sets that share rows with it."""
    spent: Total
    runs: tuple[RunRecord, ...]
    shared: tuple[str, ...]
    """Names of the other data sets that share rows (or users) with it."""

    def document(self) -> dict[str, Any]:
        """The account for JSON. An infinite ε becomes null; ``why`` gives the reason."""
        members: dict[str, Any] = asdict(self)
        members["spent"]["epsilon"] = finite(self.spent.epsilon)
        for member, run in zip(members["runs"], self.runs, strict=True):
            member["charge"]["epsilon"] = finite(run.charge.epsilon)
        return members


class Ledger:
    """Opens the ledger at ``path``; creates it if it doesn't exist.

    Raises:
        LedgerInvalid: the file can't be read or written, or isn't a ledger.
    """

    def __init__(self, path: Path) -> None:
        self._store = Store(path)
        self._salt = self._store.salt()
        self._locks: dict[int, RunLock] = {}

    def close(self) -> None:
        """Close the file and release the locks of unfinished runs; they stay charged."""
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
        """Charge a run before it starts, or resume an unfinished run with the same id. On disk when this returns.

        ``epsilon_cap`` is stored with the data set. A later one can only lower it; :meth:`set_epsilon_cap` can raise
        it. A cap doesn't stop runs that are charged already.

        Raises:
            BudgetExceeded: a row would exceed its cap; nothing was charged.
            Conflict: another process is executing this run.
            LedgerInvalid: the charge couldn't be written.
        """
        records = records_of(rows, charge.unit, self._salt)
        run_hash = salted(self._salt, "work", run_id)
        with ExitStack() as undo, self._store.transaction() as connection:
            data_set = find_or_insert(connection, records, len(rows), name)
            run = unfinished(connection, data_set, run_hash, charge)
            if epsilon_cap is not None:
                lower_cap(connection, data_set, checked_cap(epsilon_cap))
            if run is None:
                check_caps(connection, data_set, charge, name)
                run = Run(insert_run(connection, data_set, run_hash, charge, key := new_key()), key, False)
            lock = RunLock(self._store.path, run.id)
            if run.id in self._locks or not lock.acquire():
                raise Conflict(f"this run (number {run.id}) is already running in another process; wait until it ends")
            undo.callback(lock.remove)  # in case the commit fails
            connection.execute("COMMIT")
            undo.pop_all()
            self._locks[run.id] = lock
        return run

    def finish(self, run: Run) -> None:
        """Mark ``run`` as finished, once its result is saved. Its key is deleted, so the same id is then a new run."""
        with self._store.transaction() as connection:
            connection.execute("UPDATE runs SET key = NULL, ended = ? WHERE id = ? AND key NOT NULL", (now(), run.id))
        lock = self._locks.pop(run.id, None)
        if lock is not None:
            lock.remove()

    # --- queries --------------------------------------------------------------------------------------

    def foresee(self, rows: Sequence[Row], charge: Charge) -> tuple[Total, Total]:
        """The largest total of a row, now and with ``charge`` added. Nothing is charged."""
        records = records_of(rows, charge.unit, self._salt)
        with self._store.transaction() as connection:
            connection.execute("SAVEPOINT preview")
            data_set = find_or_insert(connection, records, len(rows), "")
            before, after = largest_total(connection, data_set), largest_total(connection, data_set, charge)
            connection.execute("ROLLBACK TO preview")
        return before, after

    def account(self, rows: Sequence[Row], unit: Unit) -> Account | None:
        """The account of a data set; None if the ledger has no run and no cap for it."""
        records = records_of(rows, unit, self._salt)
        with self._store.transaction() as connection:
            renew(connection, records)
            row = connection.execute("SELECT * FROM data_sets WHERE digest = ?", (records.digest,)).fetchone()
            return None if row is None else self._account(connection, row)

    def accounts(self) -> list[Account]:
        """The accounts of all data sets, oldest first."""
        with self._store.transaction() as connection:
            data_sets = connection.execute("SELECT * FROM data_sets ORDER BY id").fetchall()
            return [self._account(connection, data_set) for data_set in data_sets]

    def set_epsilon_cap(self, rows: Sequence[Row], unit: Unit, epsilon_cap: float | None, *, name: str = "") -> None:
        """Set, raise or (with None) remove the cap of a data set.

        Raises:
            InvalidInput: the cap isn't a finite number above 0.
        """
        records = records_of(rows, unit, self._salt)
        value = None if epsilon_cap is None else checked_cap(epsilon_cap)
        with self._store.transaction() as connection:
            data_set = find_or_insert(connection, records, len(rows), name)
            connection.execute("UPDATE data_sets SET cap = ? WHERE id = ?", (value, data_set))

    def run(self, number: int) -> RunRecord:
        """One run.

        Raises:
            NotFound: there is no such run.
        """
        with self._store.transaction() as connection:
            row = connection.execute("SELECT * FROM runs WHERE id = ?", (number,)).fetchone()
            if row is None:
                raise NotFound(f"the ledger has no run {number}")
            return self._record(row)

    def _account(self, connection: sqlite3.Connection, data_set: sqlite3.Row) -> Account:
        runs = connection.execute("SELECT * FROM runs WHERE data_set = ? ORDER BY id", (data_set["id"],)).fetchall()
        overlaps = groups(connection, data_set["id"])
        others = sorted(set().union(*overlaps) - {data_set["id"]})
        return Account(
            id=data_set["id"],
            name=data_set["name"],
            unit=data_set["unit"],
            rows=data_set["rows"],
            units=data_set["units"],
            epsilon_cap=min(
                (cap for group in overlaps if (cap := cap_of(connection, group)) is not None), default=None
            ),
            spent=largest_total(connection, data_set["id"]),
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
