"""What the ledger knows of private rows: salted hashes, enough to see that a row was there before and no more."""

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
    """A data set as the ledger sees it: pairs (hash of the unit, hash of the row). For the unit row both are the same.

    A row is its text: the same text under another label, or in another file or order, is the same person's.
    """

    unit: Unit
    pairs: tuple[tuple[bytes, bytes], ...]
    """Sorted; a row that stands there twice is there twice."""
    digest: bytes
    """Names the data set; equal for the same rows in any order."""

    @property
    def units(self) -> int:
        return len({unit for unit, _ in self.pairs}) if self.unit == "user" else len(self.pairs)


def records_of(rows: Sequence[Row], unit: Unit, salt: bytes) -> Records:
    """Hash every row with the ledger's salt.

    Raises:
        DataInvalid: no rows, or (for the unit user) a row that names no user.
    """
    if not rows:
        raise DataInvalid("there are no rows to account for")
    if unit == "user" and any(row.user is None for row in rows):
        raise DataInvalid("a row names no user; privacy per user needs one for each")
    pairs = tuple(sorted(_pairs(rows, unit, salt)))
    together = hashlib.blake2b(unit.encode(), key=salt, digest_size=HASH_BYTES)
    for pair in pairs:
        together.update(b"".join(pair))
    return Records(unit, pairs, together.digest())


def salted(salt: bytes, kind: str, text: str) -> bytes:
    """A keyed hash: nobody without the salt can try out texts against it."""
    return hashlib.blake2b(text.encode(), key=salt, person=kind.encode(), digest_size=HASH_BYTES).digest()


def _pairs(rows: Iterable[Row], unit: Unit, salt: bytes) -> Iterable[tuple[bytes, bytes]]:
    for row in rows:
        text = salted(salt, "row", " ".join(row.text.split()))
        yield (text if unit == "row" else salted(salt, "user", str(row.user))), text
