"""What pydantic found wrong, in words for people who don't know pydantic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_KIND = re.compile(r"(constrained|function)-|[a-z-]+\[")


def mistakes(errors: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Where, and what is wrong there, for each of ``ValidationError.errors()``; never what was given.

    >>> mistakes([{"loc": ("alpha", "constrained-float"), "msg": "Value error, it lies in 0..1"}])
    [('alpha', 'it lies in 0..1')]
    """
    return [
        (".".join(filter(_is_named, map(str, each["loc"]))), str(each["msg"]).removeprefix("Value error, "))
        for each in errors
    ]


def first_mistake(errors: Iterable[Mapping[str, Any]]) -> str:
    """The first of them in one line."""
    where, what = next(iter(mistakes(errors)))
    return f"{where}: {what}" if where else what


def _is_named(part: str) -> bool:
    """Whether the sender wrote it: pydantic puts the kinds that it tried for a union there, too."""
    return _KIND.match(part) is None
