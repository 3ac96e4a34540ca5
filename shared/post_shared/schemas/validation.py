"""What pydantic found wrong, in words for people who don't know pydantic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_KIND = re.compile(r"(constrained|function)-|(list|literal|tuple)\[")
_PLAIN_KINDS = {"int", "str", "float", "bool"}


def validation_errors(errors: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Where, and what is wrong there, for each of ``ValidationError.errors()``; never what was given.

    >>> validation_errors([{"loc": ("alpha", "constrained-float"), "msg": "Value error, it lies in 0..1"}])
    [('alpha', 'it lies in 0..1')]
    """
    return [(_place(each["loc"]), str(each["msg"]).removeprefix("Value error, ")) for each in errors]


def first_error(errors: Iterable[Mapping[str, Any]]) -> str:
    """The first of them in one line."""
    where, what = next(iter(validation_errors(errors)))
    return f"{where}: {what}" if where else what


def _place(parts: Sequence[object]) -> str:
    """What the sender wrote of it: pydantic puts the kinds that it tried for a union there, too."""
    named = [str(part) for part in parts if _KIND.match(str(part)) is None]
    return ".".join(named[:-1] if len(named) > 1 and named[-1] in _PLAIN_KINDS else named)
