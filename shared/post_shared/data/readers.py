"""Named columns from JSON Lines, CSV, TSV, Parquet and Hugging Face ``datasets``, row by row, and lines of text.

Every error names the file and the line, and never quotes a text: the text may be private.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import IO, Any, Literal

from post_shared.errors import DataInvalid

Format = Literal["jsonl", "csv", "tsv", "parquet", "txt"]

FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
MAX_LINE = 16 * 2**20
"""Bytes; a longer line is refused."""

LocatedRow = tuple[str, Mapping[str, Any]]
"""Where a row is, for error messages, and its columns."""


def read_columns(
    source: str | Path | Iterable[Mapping[str, Any]], label_column: str | None, format: Format | None
) -> Iterator[LocatedRow]:
    """The rows of a file, a ``datasets.Dataset`` or mappings; numeric class labels get their names."""
    if isinstance(source, str | Path):
        path = Path(source)
        kind = format or format_of(path)
        if kind not in _READERS:
            raise DataInvalid(f"{path.name}: plain text has no rows; give .jsonl, .csv or .parquet")
        return _READERS[kind](path)
    if isinstance(source, Mapping):
        names = ", ".join(str(name) for name in source)
        raise DataInvalid(f"the data set has several splits; pass one of them: {names}")
    return _mappings(source, label_column)


def format_of(path: Path) -> Format:
    """The format of a file, from its name."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in FORMATS:
        raise DataInvalid(f"{path.name}: unknown kind of file; known are: {', '.join(FORMATS)} (and .gz of them)")
    return FORMATS[suffix]


def _mappings(source: Iterable[Mapping[str, Any]], label_column: str | None) -> Iterator[LocatedRow]:
    """Mappings, or a ``datasets.Dataset``, whose class labels can be numbers with names."""
    feature = (getattr(source, "features", None) or {}).get(label_column)
    names: list[str] | None = getattr(feature, "names", None)
    for number, columns in enumerate(source, start=1):
        where = f"row {number}"
        if not isinstance(columns, Mapping):
            raise DataInvalid(f"{where}: expected named columns, found {kind_of(columns)}")
        value = None if names is None else columns.get(str(label_column))
        if names is not None and isinstance(value, Integral):
            index = int(value)
            columns = {**columns, str(label_column): names[index] if 0 <= index < len(names) else None}
        yield where, columns


def _jsonl(path: Path) -> Iterator[LocatedRow]:
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            columns = json.loads(line)
        except (ValueError, RecursionError) as error:
            column = f", character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataInvalid(f"{where}{column}: not a line of JSON") from error
        if not isinstance(columns, dict):
            raise DataInvalid(f'{where}: expected an object like {{"text": …, "label": …}}, found {kind_of(columns)}')
        yield where, columns


def _separated(path: Path, delimiter: str) -> Iterator[LocatedRow]:
    reader = csv.reader((line for _, line in numbered_lines(path)), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        twice = [a for a, b in pairwise(sorted(header)) if a == b]
        if twice:
            raise DataInvalid(f"{path.name}, line 1: column {twice[0]!r} appears twice")
        for cells in reader:
            where = f"{path.name}, line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataInvalid(f"{where}: {len(cells)} cells, but the header has {len(header)} columns")
            yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataInvalid(f"{path.name}, line {reader.line_num}: {error}") from error


def _csv(path: Path) -> Iterator[LocatedRow]:
    return _separated(path, ",")


def _tsv(path: Path) -> Iterator[LocatedRow]:
    return _separated(path, "\t")


def _parquet(path: Path) -> Iterator[LocatedRow]:
    import pyarrow as arrow  # slow to import, and only this format needs it
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for columns in batch.to_pylist():
                    number += 1
                    yield f"{path.name}, row {number}", columns
    except OSError as error:
        raise DataInvalid(f"{path.name}: can't be read: {error.strerror or error}") from error
    except arrow.ArrowException as error:
        raise DataInvalid(f"{path.name}: not a Parquet file: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[LocatedRow]]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
}


# --- lines --------------------------------------------------------------------------------------------


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of UTF-8 text, with their line ends; gzip is decompressed."""
    number = 0
    try:
        with _binary(path) as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise DataInvalid(f"{path.name}, line {number}: longer than {MAX_LINE} bytes")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataInvalid(f"{path.name}, line {number}: not UTF-8 text (byte {error.start + 1})") from error
    except FileNotFoundError as error:
        raise DataInvalid(f"{path}: there is no such file") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataInvalid(f"{path.name}, after line {number}: the gzip file is damaged or truncated") from error
    except OSError as error:
        raise DataInvalid(f"{path}: can't be read: {error.strerror or error}") from error


def _binary(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if compressed else path.open("rb")  # type: ignore[return-value]


def kind_of(value: Any) -> str:
    """A value's type, to name in an error message; never the value."""
    return "nothing" if value is None else type(value).__name__
