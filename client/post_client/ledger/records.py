"""How the ledger identifies private rows: by salted hashes, which only show whether a row was used before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from post_client.privacy.accounting import Unit
from post_shared.data.rows import Row
from post_shared.errors import DataInvalid

HASH_BYTES = 16


@dataclass(frozen=True)
class Records:
    """A data set as the ledger stores it: pairs (hash of the unit, hash of the row), which are equal for the unit row.

    A row is identified by its text alone, not by its label, file or position.
    """

    unit: Unit
    pairs: tuple[tuple[bytes, bytes], ...]
    """Sorted; duplicate rows are kept."""
    digest: bytes
    """Identifies the data set; equal for the same rows in any order."""

    @property
    def units(self) -> int:
        return len({unit for unit, _ in self.pairs}) if self.unit == "user" else len(self.pairs)


def records_of(rows: Sequence[Row], unit: Unit, salt: bytes) -> Records:
    """Hash every row with the ledger's salt.

    Raises:
        DataInvalid: no rows, or (for the unit user) a row without a user.
    """
    if not rows:
        raise DataInvalid("there are no rows to account for")
    if unit == "user" and any(row.user is None for row in rows):
        raise DataInvalid("a row has no user; privacy per user needs a user for every row")
    pairs = tuple(sorted(_pairs(rows, unit, salt)))
    digest = hashlib.blake2b(unit.encode(), key=salt, digest_size=HASH_BYTES)
    for pair in pairs:
        digest.update(b"".join(pair))
    return Records(unit, pairs, digest.digest())


def salted(salt: bytes, kind: str, text: str) -> bytes:
    """A keyed hash: without the salt, nobody can test texts against it."""
    return hashlib.blake2b(text.encode(), key=salt, person=kind.encode(), digest_size=HASH_BYTES).digest()


def _pairs(rows: Iterable[Row], unit: Unit, salt: bytes) -> Iterable[tuple[bytes, bytes]]:
    for row in rows:
        text = salted(salt, "row", " ".join(row.text.split()))
        yield (text if unit == "row" else salted(salt, "user", str(row.user))), text
