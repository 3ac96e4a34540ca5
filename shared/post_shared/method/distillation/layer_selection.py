"""Which of the target's layers a student keeps (method §1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from post_shared.errors import InvalidInput

FRONT_POWER = 1.95


def ends(count: int, layers: int) -> list[int]:
    """Half from each end, the larger half from the front, as in the paper (App. B.1).

    >>> ends(4, 30)
    [0, 1, 28, 29]
    """
    front = (count + 1) // 2
    return [*range(front), *range(layers - (count - front), layers)]


def even(count: int, layers: int, power: float = 1.0) -> list[int]:
    """Evenly spaced from the first to the last; with ``power`` above 1 denser at the front.

    >>> even(4, 30), even(4, 30, power=2.0), even(1, 30)
    ([0, 10, 19, 29], [0, 3, 13, 29], [29])
    """
    last = layers - 1
    kept = [round(last * (i / (count - 1)) ** power) for i in range(count)] if count > 1 else [last]
    for i in range(1, count):  # a high power rounds several to the same layer
        kept[i] = max(kept[i], kept[i - 1] + 1)
    for i in reversed(range(count)):
        kept[i] = min(kept[i], layers - (count - i))
    return kept


def front(count: int, layers: int) -> list[int]:
    """Denser at the front: the gaps between kept layers grow from front to back."""
    return even(count, layers, power=FRONT_POWER)


def chosen_layers(keep: int | Sequence[int], layers: int, pattern: str = "front") -> list[int]:
    """Indices of the kept layers: ``keep`` of them in the named pattern, or the listed ones.

    Raises:
        InvalidInput: a count out of range, or indices that are out of range, repeated or not ascending.
    """
    if isinstance(keep, int):
        if not 1 <= keep <= layers:
            raise InvalidInput(f"keep between 1 and {layers} layers, not {keep}")
        return PATTERNS[pattern](keep, layers)
    kept = list(keep)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= layers:
        raise InvalidInput(f"the layers to keep must be ascending indices in 0..{layers - 1}, not {kept}")
    return kept


PATTERNS: dict[str, Callable[[int, int], list[int]]] = {"ends": ends, "even": even, "front": front}
"""Patterns of kept layers by name. A new pattern is a new entry here."""
