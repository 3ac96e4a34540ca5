"""The operations of the OpenAPI document, and the one that a request reaches."""

from __future__ import annotations

import re
from typing import Any


def operations(document: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Operation id -> method and path."""
    return {
        operation["operationId"]: (method.upper(), path)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def operation_of(document: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    """The operation that a request reaches, as the document describes it."""
    matching = [
        operation
        for template, methods in document["paths"].items()
        if re.fullmatch(re.sub(r"{path}", ".+", re.sub(r"{(?!path)\w+}", "[^/]+", template)), path)
        for name, operation in methods.items()
        if name.upper() == method
    ]
    assert len(matching) == 1, (method, path, [operation["operationId"] for operation in matching])
    matched: dict[str, Any] = matching[0]
    return matched


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A schema, or the one it refers to."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        referred: dict[str, Any] = document["components"]["schemas"][name]
        return referred
    return schema
