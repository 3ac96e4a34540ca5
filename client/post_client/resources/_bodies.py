"""Documents to send, made of a verb's keywords."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from post_shared.errors import InvalidInput
from post_shared.mistakes import first_mistake
from post_shared.schemas import Document

D = TypeVar("D", bound=Document)


def body(document: type[D], **members: Any) -> D:
    """The document.

    Raises:
        InvalidInput: a member is unknown, or its value impossible; nothing was sent.
    """
    try:
        return document(**members)
    except ValidationError as error:
        raise InvalidInput(first_mistake(error.errors())) from error
