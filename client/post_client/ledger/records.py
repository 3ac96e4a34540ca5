"""How the ledger identifies private rows: by salted hashes, which only show whether a row was used before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from post_client.privacy.accounting import Unit
from post_client.privacy.text_identity import normalized
from post_shared.data.rows import Row
from post_shared.errors import DataInvalid

HASH_BYTES = 16


@dataclass(frozen=True)
class Records:
    """A data set as the ledger stores it: pairs (hash of the unit, hash of the row), which are equal for the unit row.

    A row is identified by its text alone (:mod:`post_client.privacy.text_identity`), not by its label, file or
    position.
    """

    unit: Unit
    pairs: tuple[tuple[bytes, bytes], ...]
    """Sorted; duplicate rows are kept."""
    digest: bytes
    """Identifies the data set; equal for the same rows in any order."""
    former_digest: bytes
    """The digest before texts were normalised for Unicode and case."""
    former_rows: Mapping[bytes, bytes]
    """Hashes of rows from then, where they differ: the hash that each has now."""

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
    now = [salted(salt, "row", normalized(row.text)) for row in rows]
    then = [salted(salt, "row", " ".join(row.text.split())) for row in rows]
    pairs, former = (tuple(sorted(_pairs(rows, unit, salt, hashes))) for hashes in (now, then))
    changed = {old: new for old, new in zip(then, now, strict=True) if old != new}
    return Records(unit, pairs, _digest(pairs, unit, salt), _digest(former, unit, salt), changed)


def salted(salt: bytes, kind: str, text: str) -> bytes:
    """A keyed hash: without the salt, nobody can test texts against it."""
    return hashlib.blake2b(text.encode(), key=salt, person=kind.encode(), digest_size=HASH_BYTES).digest()


def _pairs(rows: Sequence[Row], unit: Unit, salt: bytes, hashes: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    for row, text in zip(rows, hashes, strict=True):
        yield (text if unit == "row" else salted(salt, "user", str(row.user))), text


def _digest(pairs: Iterable[tuple[bytes, bytes]], unit: Unit, salt: bytes) -> bytes:
    digest = hashlib.blake2b(unit.encode(), key=salt, digest_size=HASH_BYTES)
    for pair in pairs:
        digest.update(b"".join(pair))
    return digest.digest()
