"""What runs at a time in a private step: rows of one shape, which each row has by itself.

Clipping bounds what a row does to the sum only if its gradient depends on that row alone. Padded to the longest row
beside it, it depends on that one's length in a student whose configuration makes it feel padding or length, and weights
can be made such that no trial on made-up rows shows it. So a row is padded to the next multiple of :data:`GRID`, which
follows from its own length, and shares passes with rows of that shape only.
"""

from __future__ import annotations

from post_shared.data.batches import Batch

GRID = 8
"""Tokens: coarse enough for few passes, fine enough for little padding."""


def shape(tokens: int, longest: int | None = None) -> int:
    """To how many tokens a row of so many is padded; to none beyond ``longest``, which no row may follow from.

    >>> shape(1), shape(8), shape(9), shape(31, longest=30)
    (8, 8, 16, 31)
    """
    padded = -(-tokens // GRID) * GRID
    return padded if longest is None else max(tokens, min(padded, longest))


def most(size: int, positions: int, longest: int | None) -> int:
    """How many rows of so many ``positions`` take no more than ``size`` of the ``longest``; ``size`` without that.

    >>> most(16, 32, 128), most(16, 32, None), most(1, 200, 128)
    (64, 16, 1)
    """
    return size if longest is None else max(1, size * longest // positions)


def alike(batch: Batch, size: int, longest: int | None = None, *, behind: int = 0) -> list[Batch]:
    """Micro-batches of rows of one shape; together the rows of ``batch``.

    Each has at most ``size`` rows of the ``longest`` shape, or as many shorter ones as take no more positions, those of
    the ``behind`` vectors before each row counted in.
    """
    reserved = None if longest is None else longest + behind
    shapes: dict[int, list[int]] = {}
    for row in batch.index:
        shapes.setdefault(shape(batch.encoded.length(row), longest), []).append(row)
    return [
        Batch(batch.encoded, tuple(rows[at : at + count]), least=tokens)
        for tokens, rows in sorted(shapes.items())
        for count in [most(size, tokens + behind, reserved)]
        for at in range(0, len(rows), count)
    ]
