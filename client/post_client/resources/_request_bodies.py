"""Build request bodies from a method's keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from post_shared.errors import InvalidInput
from post_shared.schemas.common import Document, Options
from post_shared.schemas.validation import first_error

D = TypeVar("D", bound=Document)


def body(document: type[D], **members: Any) -> D:
    """The document, validated before it is sent.

    Raises:
        InvalidInput: a member is unknown or its value is invalid.
    """
    try:
        return document(**members)
    except ValidationError as error:
        raise InvalidInput(first_error(error.errors())) from error


def values(options: Options | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``options``, overridden by ``changes``. Unset ones are left to the server's defaults."""
    return {**(options.model_dump(exclude_unset=True) if options else {}), **changes}
