"""The ledger's SQL on data sets, records and charges. The caller opens the transaction."""

from __future__ import annotations

import math
import sqlite3
from datetime import UTC, datetime
from typing import Any

from post_client.ledger.budget import Charge, Total, total
from post_client.ledger.records import Records
from post_client.ledger.reservation import Run
from post_client.privacy.accounting import Mechanism
from post_client.privacy.text_identity import NORMALIZATION
from post_shared.errors import BudgetExceeded, InvalidInput

_GROUPS = """
WITH own AS (SELECT unit, row FROM records WHERE data_set = :id),
met AS (
    SELECT own.unit AS unit, other.data_set AS data_set FROM own JOIN records AS other ON other.unit = own.unit
    UNION
    SELECT own.unit, other.data_set FROM own JOIN records AS other ON other.row = own.row
    JOIN data_sets ON data_sets.id = other.data_set WHERE data_sets.unit != :unit
)
SELECT DISTINCT sets FROM (
    SELECT group_concat(data_set) AS sets FROM (SELECT unit, data_set FROM met ORDER BY unit, data_set) GROUP BY unit
)
"""
"""For each row (or user) of one data set: the ids of all data sets that contain it. Users are matched by name and rows
by text; data sets of different units are matched by text."""


def find_or_insert(connection: sqlite3.Connection, records: Records, rows: int, name: str) -> int:
    """The data set's id; a new data set is inserted with its records. A given name replaces the stored one."""
    renew(connection, records)
    row = connection.execute("SELECT id FROM data_sets WHERE digest = ?", (records.digest,)).fetchone()
    if row is not None:
        if name:
            connection.execute("UPDATE data_sets SET name = ? WHERE id = ?", (name, row["id"]))
        return int(row["id"])
    inserted = connection.execute(
        "INSERT INTO data_sets (digest, unit, name, rows, units, normalization) VALUES (?, ?, ?, ?, ?, ?)",
        (records.digest, records.unit, name, rows, records.units, NORMALIZATION),
    )
    data_set = int(inserted.lastrowid or 0)
    unique_records = ((data_set, unit, text) for unit, text in dict.fromkeys(records.pairs))
    connection.executemany("INSERT INTO records VALUES (?, ?, ?)", unique_records)
    return data_set


def renew(connection: sqlite3.Connection, records: Records) -> None:
    """Give these rows the hashes of today in data sets that an earlier version wrote.

    A ledger keeps no texts, so its hashes can be renewed only when their rows are seen again.
    """
    if not one(connection, "SELECT count(*) FROM data_sets WHERE normalization < ?", NORMALIZATION):
        return
    for column, only in (("row", ""), ("unit", "AND unit = 'row'")):
        connection.executemany(
            f"UPDATE OR REPLACE records SET {column} = ? WHERE {column} = ? AND data_set IN "  # noqa: S608  two constants
            f"(SELECT id FROM data_sets WHERE normalization < {NORMALIZATION} {only})",
            ((new, old) for old, new in records.former_rows.items()),
        )
    connection.execute(
        "UPDATE OR IGNORE data_sets SET digest = ?, normalization = ? WHERE digest = ?",
        (records.digest, NORMALIZATION, records.former_digest),
    )


def unfinished(connection: sqlite3.Connection, data_set: int, run_hash: bytes, charge: Charge) -> Run | None:
    """The unfinished run with the same id and charge."""
    query = "SELECT * FROM runs WHERE data_set = ? AND work = ? AND key NOT NULL ORDER BY id DESC"
    for row in connection.execute(query, (data_set, run_hash)):
        if charge_of(row) == charge:
            return Run(int(row["id"]), bytes(row["key"]), True)
    return None


def insert_run(connection: sqlite3.Connection, data_set: int, run_hash: bytes, charge: Charge, key: bytes) -> int:
    """Insert a charged run. Returns its id."""
    m = charge.mechanism
    mechanism = (None, None, None) if m is None else (m.noise_multiplier, m.rate, m.steps)
    inserted = connection.execute(
        "INSERT INTO runs (data_set, work, key, unit, delta, noise_multiplier, rate, steps, started) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (data_set, run_hash, key, charge.unit, charge.delta, *mechanism, now()),
    )
    return int(inserted.lastrowid or 0)


def groups(connection: sqlite3.Connection, data_set: int) -> list[frozenset[int]]:
    """The distinct groups of data sets that contain a common row; subsets of other groups are left out."""
    unit = one(connection, "SELECT unit FROM data_sets WHERE id = ?", data_set)
    rows = connection.execute(_GROUPS, {"id": data_set, "unit": unit})
    all_groups = [frozenset(map(int, row["sets"].split(","))) for row in rows]
    return [group for group in all_groups if not any(group < other for other in all_groups)]


def charges_on(connection: sqlite3.Connection, group: frozenset[int]) -> list[Charge]:
    marks = ",".join("?" * len(group))
    rows = connection.execute(f"SELECT * FROM runs WHERE data_set IN ({marks}) ORDER BY id", tuple(group))  # noqa: S608
    return [charge_of(row) for row in rows]


def cap_of(connection: sqlite3.Connection, group: frozenset[int]) -> float | None:
    marks = ",".join("?" * len(group))
    query = f"SELECT min(cap) FROM data_sets WHERE id IN ({marks})"  # noqa: S608  only question marks
    (epsilon_cap,) = connection.execute(query, tuple(group)).fetchone()
    return None if epsilon_cap is None else float(epsilon_cap)


def largest_total(connection: sqlite3.Connection, data_set: int, *added: Charge) -> Total:
    """The largest total of a row of ``data_set``, with ``added`` charged to all of its rows."""
    totals = (total([*charges_on(connection, group), *added]) for group in groups(connection, data_set))
    return max(totals, key=lambda each: each.epsilon)


def check_caps(connection: sqlite3.Connection, data_set: int, charge: Charge, name: str) -> None:
    """Check that ``charge`` keeps every row of ``data_set`` within its cap.

    Raises:
        BudgetExceeded: a row would exceed its cap.
    """
    for group in groups(connection, data_set):
        epsilon_cap = cap_of(connection, group)
        if epsilon_cap is None:
            continue
        charges = charges_on(connection, group)
        before, after = total(charges), total([*charges, charge])
        if after.epsilon > epsilon_cap:
            unit = f"a {charge.unit} of {name or 'this data set'}"
            reason = (
                f"with this run, {unit} would have {after.in_runs()}; the cap is {epsilon_cap:g}, and {before.words()} "
                "is spent"
            )
            if before.epsilon > epsilon_cap:
                reason = f"{unit} has {before.in_runs()} already, and the cap is {epsilon_cap:g}"
            raise BudgetExceeded(
                f"{reason}. Nothing was charged and nothing was trained: use a smaller epsilon or, if you may, raise "
                "the cap (post ledger --data FILE --epsilon-cap X)",
                epsilon_cap=epsilon_cap,
                spent=finite(before.epsilon),
                would_be=finite(after.epsilon),
            )


def lower_cap(connection: sqlite3.Connection, data_set: int, epsilon_cap: float) -> None:
    """Set the cap of a data set, or lower it; never raise it."""
    connection.execute(
        "UPDATE data_sets SET cap = min(coalesce(cap, ?), ?) WHERE id = ?", (epsilon_cap, epsilon_cap, data_set)
    )


def checked_cap(epsilon_cap: float) -> float:
    """``epsilon_cap``, if it is a finite number above 0.

    Raises:
        InvalidInput: it isn't.
    """
    if not (math.isfinite(epsilon_cap) and epsilon_cap > 0):
        raise InvalidInput(f"a cap on epsilon must be a finite number above 0, not {epsilon_cap}")
    return epsilon_cap


def charge_of(row: sqlite3.Row) -> Charge:
    if row["noise_multiplier"] is None:
        return Charge(row["unit"], row["delta"], None)
    return Charge(row["unit"], row["delta"], Mechanism(row["noise_multiplier"], row["rate"], row["steps"]))


def one(connection: sqlite3.Connection, query: str, argument: object) -> Any:
    """The first column of the first row."""
    return connection.execute(query, (argument,)).fetchone()[0]


def finite(epsilon: float) -> float | None:
    """``epsilon``, or None if it is infinite."""
    return epsilon if math.isfinite(epsilon) else None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
