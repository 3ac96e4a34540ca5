"""Which of the target's layers a student keeps (method §1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from post_shared.errors import InvalidInput

FRONT_POWER = 1.95


def ends(count: int, layers: int) -> list[int]:
    """Half from each end, the larger half from the front, as the paper does.

    >>> ends(4, 30)
    [0, 1, 28, 29]
    """
    front = (count + 1) // 2
    return [*range(front), *range(layers - (count - front), layers)]


def even(count: int, layers: int, power: float = 1.0) -> list[int]:
    """Spread evenly from the first to the last; with ``power`` above 1 denser in front.

    >>> even(4, 30), even(4, 30, power=2.0), even(1, 30)
    ([0, 10, 19, 29], [0, 3, 13, 29], [29])
    """
    last = layers - 1
    places = [round(last * (at / (count - 1)) ** power) for at in range(count)] if count > 1 else [last]
    for at in range(1, count):  # powers put several on one place
        places[at] = max(places[at], places[at - 1] + 1)
    for at in reversed(range(count)):
        places[at] = min(places[at], layers - (count - at))
    return places


def front(count: int, layers: int) -> list[int]:
    """The gaps between kept layers grow from the front to the back."""
    return even(count, layers, power=FRONT_POWER)


def chosen_layers(keep: int | Sequence[int], layers: int, pattern: str = "front") -> list[int]:
    """Indices of the kept layers: a number of them in that pattern, or those that are listed.

    Raises:
        InvalidInput: indices out of range, repeated or out of order, or nothing left to leave out.
    """
    if isinstance(keep, int):
        if not 1 <= keep <= layers:
            raise InvalidInput(f"keep between 1 and {layers} layers, not {keep}")
        return PATTERNS[pattern](keep, layers)
    kept = list(keep)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= layers:
        raise InvalidInput(f"the layers to keep are rising indices in 0..{layers - 1}, not {kept}")
    return kept


PATTERNS: dict[str, Callable[[int, int], list[int]]] = {"ends": ends, "even": even, "front": front}
"""How a number of layers is spread, by name. A better pattern is a new entry here."""
