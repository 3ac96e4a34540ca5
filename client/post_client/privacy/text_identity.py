"""When two private texts are the same row: one rule, for the ledger and for the count of rows that are public."""

from __future__ import annotations

import unicodedata

NORMALIZATION = 1
"""Version of :func:`normalized`. Ledgers keep hashes of its results: a change needs another version."""


def normalized(text: str) -> str:
    """``text`` as far as its identity goes: without differences of case, whitespace or Unicode compatibility (NFKC)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())
