"""Base classes and types of the documents under ``/v1``. Never imports torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from post_shared.errors import InvalidInput
from post_shared.schemas.validation import first_error

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="A short name in lower case.")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Reference = Annotated[str, Field(min_length=1, max_length=64)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
T = TypeVar("T")


class Document(BaseModel):
    """Base of all documents. Unknown members are refused, so that a misspelt one isn't silently ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Options(Document):
    """Base of the settings of one operation: frozen, and always valid.

    API, command line and library share them. The API embeds them in its ``…Create`` bodies.
    """

    model_config = ConfigDict(frozen=True)

    def __init__(self, /, **values: Any) -> None:
        """
        Raises:
            InvalidInput: an invalid value or an unknown name.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidInput(first_error(error.errors())) from error

    # In an API body, pydantic validates without calling it and reports every error with its location.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def replace(self, **changes: Any) -> Self:
        """A copy with some values changed, validated again."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


class Role(StrEnum):
    PROVIDER = "provider"
    OWNER = "owner"


class Page(Document, Generic[T]):
    """One page of a list; pass ``next_cursor`` as ``?cursor=`` to get the next one."""

    items: list[T]
    next_cursor: str | None = None


class Problem(BaseModel):
    """RFC 9457 problem document. ``code`` is stable; further members depend on it."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None = None
