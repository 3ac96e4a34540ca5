"""The ledger's questions to its file, each inside a transaction of the caller's."""

from __future__ import annotations

import math
import sqlite3
from datetime import UTC, datetime
from typing import Any

from post_client.ledger.budget import Charge, Total, total
from post_client.ledger.records import Records
from post_client.ledger.reservation import Run
from post_client.privacy.accounting import Mechanism
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
"""The sets of data sets that some row (or user) of one data set is in. Users meet by name, rows by text; a set of the
other unit is met by its texts."""


def enter(connection: sqlite3.Connection, records: Records, rows: int, name: str) -> int:
    """The data set's number; a new one is written with its records. The name is the latest one."""
    found = connection.execute("SELECT id FROM data_sets WHERE digest = ?", (records.digest,)).fetchone()
    if found is not None:
        if name:
            connection.execute("UPDATE data_sets SET name = ? WHERE id = ?", (name, found["id"]))
        return int(found["id"])
    made = connection.execute(
        "INSERT INTO data_sets (digest, unit, name, rows, units) VALUES (?, ?, ?, ?, ?)",
        (records.digest, records.unit, name, rows, records.units),
    )
    number = int(made.lastrowid or 0)
    every = ((number, unit, row) for unit, row in dict.fromkeys(records.pairs))
    connection.executemany("INSERT INTO records VALUES (?, ?, ?)", every)
    return number


def unfinished(connection: sqlite3.Connection, data_set: int, run_id: bytes, charge: Charge) -> Run | None:
    """The run of the same work, with the same charge, whose result was never kept."""
    question = "SELECT * FROM runs WHERE data_set = ? AND work = ? AND key NOT NULL ORDER BY id DESC"
    for row in connection.execute(question, (data_set, run_id)):
        if charge_of(row) == charge:
            return Run(int(row["id"]), bytes(row["key"]), True)
    return None


def insert(connection: sqlite3.Connection, data_set: int, run_id: bytes, charge: Charge, key: bytes) -> int:
    m = charge.mechanism
    mechanism = (None, None, None) if m is None else (m.noise_multiplier, m.rate, m.steps)
    made = connection.execute(
        "INSERT INTO runs (data_set, work, key, unit, delta, noise_multiplier, rate, steps, started) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (data_set, run_id, key, charge.unit, charge.delta, *mechanism, now()),
    )
    return int(made.lastrowid or 0)


def groups(connection: sqlite3.Connection, data_set: int) -> list[frozenset[int]]:
    """The data sets that contain a row, for each kind of row; without those that another kind outdoes."""
    unit = one(connection, "SELECT unit FROM data_sets WHERE id = ?", data_set)
    found = connection.execute(_GROUPS, {"id": data_set, "unit": unit})
    found_groups = [frozenset(map(int, row["sets"].split(","))) for row in found]
    return [group for group in found_groups if not any(group < other for other in found_groups)]


def charges_on(connection: sqlite3.Connection, group: frozenset[int]) -> list[Charge]:
    marks = ",".join("?" * len(group))
    found = connection.execute(f"SELECT * FROM runs WHERE data_set IN ({marks}) ORDER BY id", tuple(group))  # noqa: S608
    return [charge_of(row) for row in found]


def cap_of(connection: sqlite3.Connection, group: frozenset[int]) -> float | None:
    marks = ",".join("?" * len(group))
    question = f"SELECT min(cap) FROM data_sets WHERE id IN ({marks})"  # noqa: S608  question marks alone
    (epsilon_cap,) = connection.execute(question, tuple(group)).fetchone()
    return None if epsilon_cap is None else float(epsilon_cap)


def worst(connection: sqlite3.Connection, data_set: int, *more: Charge) -> Total:
    """The largest total of a row of ``data_set``, with ``more`` charged to all of its rows."""
    totals = (total([*charges_on(connection, group), *more]) for group in groups(connection, data_set))
    return max(totals, key=lambda each: each.epsilon)


def check_caps(connection: sqlite3.Connection, data_set: int, charge: Charge, name: str) -> None:
    for group in groups(connection, data_set):
        epsilon_cap = cap_of(connection, group)
        if epsilon_cap is None:
            continue
        charges = charges_on(connection, group)
        before, after = total(charges), total([*charges, charge])
        if after.epsilon > epsilon_cap:
            whose = f"a {charge.unit} of {name or 'this data set'}"
            found = f"with this run, {whose} would have {after.in_runs()}; the cap is {epsilon_cap:g} and {before.words()} is spent"
            if before.epsilon > epsilon_cap:
                found = f"{whose} has {before.in_runs()} already, and the cap is {epsilon_cap:g}"
            raise BudgetExceeded(
                f"{found}. Nothing was charged and nothing trained: ask for less, or raise the cap "
                "(post ledger --data FILE --epsilon-cap X) if you may",
                epsilon_cap=epsilon_cap,
                spent=finite(before.epsilon),
                would_be=finite(after.epsilon),
            )


def lower_cap(connection: sqlite3.Connection, data_set: int, epsilon_cap: float) -> None:
    connection.execute(
        "UPDATE data_sets SET cap = min(coalesce(cap, ?), ?) WHERE id = ?", (epsilon_cap, epsilon_cap, data_set)
    )


def checked_cap(epsilon_cap: float) -> float:
    if not (math.isfinite(epsilon_cap) and epsilon_cap > 0):
        raise InvalidInput(f"a cap on epsilon is a finite number above 0, not {epsilon_cap}")
    return epsilon_cap


def charge_of(row: sqlite3.Row) -> Charge:
    if row["noise_multiplier"] is None:
        return Charge(row["unit"], row["delta"], None)
    return Charge(row["unit"], row["delta"], Mechanism(row["noise_multiplier"], row["rate"], row["steps"]))


def one(connection: sqlite3.Connection, question: str, argument: object) -> Any:
    return connection.execute(question, (argument,)).fetchone()[0]


def finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
