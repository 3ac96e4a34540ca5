"""The header of an untrusted safetensors file, checked without reading any weights.

A file consists of eight bytes (little endian) with the length of the header, the header in JSON, and the tensors. The
header is checked completely before any memory is allocated, so the safetensors library only reads valid files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Any

PREFIX = 8
BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
MAX_DIMENSION = 2**40


class HeaderInvalid(ValueError):
    """The problem, in words. Callers turn it into their own error."""


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it; offsets count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    entries: tuple[Entry, ...]
    """Sorted by their offsets."""
    metadata: dict[str, str]


def header_length(prefix: bytes, total: int, limit: int) -> int:
    """The length of the header, from a file's first eight bytes, if it fits ``total`` bytes and ``limit``.

    Raises:
        HeaderInvalid: the file is truncated, or the header is longer than the file or the limit.
    """
    if len(prefix) < PREFIX:
        raise HeaderInvalid(f"the file has {len(prefix)} bytes; a safetensors file starts with {PREFIX}")
    length = int.from_bytes(prefix[:PREFIX], "little")
    if length > limit:
        raise HeaderInvalid(
            f"it announces a header of {length} bytes, but at most {limit} are allowed: is it a safetensors file?"
        )
    if length > total - PREFIX:
        raise HeaderInvalid(
            f"it announces a header of {length} bytes, but only {total - PREFIX} follow: is the file truncated?"
        )
    return length


def parse_header(header: bytes, data_bytes: int) -> Header:
    """Parse a header and check it against the number of bytes that follow it.

    Raises:
        HeaderInvalid: not a JSON object, unknown members or dtypes, shapes that don't match the offsets, gaps,
            overlaps, or tensors that don't fill the data exactly.
    """
    try:
        document = json.loads(header.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise HeaderInvalid("the header is not JSON") from error
    if not isinstance(document, dict):
        raise HeaderInvalid("the header is not a JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderInvalid("the metadata must be strings")
    entries = sorted((_entry(name, value) for name, value in document.items()), key=lambda entry: entry.begin)
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise HeaderInvalid(f"tensor {entry.name!r} starts at byte {entry.begin}; expected {end}")
        end = entry.end
    if end != data_bytes:
        raise HeaderInvalid(f"the tensors take {end} bytes, but {data_bytes} follow the header: truncated or too long")
    return Header(tuple(entries), metadata)


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise HeaderInvalid(f"tensor {name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise HeaderInvalid(f"tensor {name!r} has the unknown dtype {str(dtype)[:20]!r}")
    if not _sizes(shape) or len(shape) > 8:
        raise HeaderInvalid(f"tensor {name!r} has an impossible shape")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * BYTES[dtype]:
        raise HeaderInvalid(f"tensor {name!r}: the offsets don't match shape and dtype")
    return Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_DIMENSION for size in value)
