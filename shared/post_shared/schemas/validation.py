"""pydantic's validation errors in words for people who don't know pydantic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_KIND = re.compile(r"(constrained|function)-|(list|literal|tuple)\[")
_PLAIN_KINDS = {"int", "str", "float", "bool"}


def validation_errors(errors: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Location and message of each of ``ValidationError.errors()``; never the invalid value.

    >>> validation_errors([{"loc": ("alpha", "constrained-float"), "msg": "Value error, it lies in 0..1"}])
    [('alpha', 'it lies in 0..1')]
    """
    return [(_location(error["loc"]), str(error["msg"]).removeprefix("Value error, ")) for error in errors]


def first_error(errors: Iterable[Mapping[str, Any]]) -> str:
    """The first error in one line."""
    location, message = next(iter(validation_errors(errors)))
    return f"{location}: {message}" if location else message


def _location(parts: Sequence[object]) -> str:
    """The location in the sender's document, without the types that pydantic adds for the members of a union."""
    named = [str(part) for part in parts if _KIND.match(str(part)) is None]
    return ".".join(named[:-1] if len(named) > 1 and named[-1] in _PLAIN_KINDS else named)
