"""Rows and corpora out of JSON Lines, CSV, Parquet and Hugging Face ``datasets``.

A data set becomes a list of :class:`Row`. Every error names the file, the line and the column, and never
quotes a text: the text may be private.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
"""Bytes: a longer line is no row of text."""

Place = tuple[str, Mapping[str, Any]]
"""Where a row stands, in words, and its columns."""


@dataclass(frozen=True)
class Row:
    """One example: a text and, if known, its label (or, for generation, its answer)."""

    text: str
    label: str | None = None


def read_rows(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    text_column: str = "text",
    label_column: str | None = "label",
    labels: Collection[str] | None = None,
    format: Format | None = None,
) -> list[Row]:
    """All rows of a file (.jsonl, .csv, .tsv, .parquet; gzip is recognised), a ``datasets.Dataset``, or mappings.

    Args:
        label_column: None leaves the labels unread. A column that isn't there gives rows without labels.
        labels: if given, every row must have one of these labels.
        format: what the file holds; by default its name tells.

    Raises:
        DataInvalid: names the file, the line (or row) and the column.
    """
    wanted = iter_rows(source, text_column=text_column, label_column=label_column, labels=labels, format=format)
    rows = list(wanted)
    if not rows:
        name = Path(source).name if isinstance(source, str | Path) else "the data set"
        raise DataInvalid(f"{name}: there are no rows")
    return rows


def iter_rows(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    text_column: str = "text",
    label_column: str | None = "label",
    labels: Collection[str] | None = None,
    format: Format | None = None,
) -> Iterator[Row]:
    """The rows of :func:`read_rows` one by one, for files that don't fit into memory."""
    for where, columns in _open(source, label_column, format):
        text = _text(where, columns, text_column)
        yield Row(text, _label(where, columns, label_column, labels))


def read_corpus(source: str | Path, *, text_column: str = "text", format: Format | None = None) -> list[str]:
    """The paragraphs of a text file (one a line, blank lines left out), or the texts of a file of rows.

    Raises:
        DataInvalid: unreadable or empty; names the file and the line.
    """
    path = Path(source)
    if (format or _format(path)) != "txt":
        return [row.text for row in read_rows(path, text_column=text_column, label_column=None, format=format)]
    paragraphs = list(iter_paragraphs(path))
    if not paragraphs:
        raise DataInvalid(f"{path.name}: there is no text in it")
    return paragraphs


def iter_paragraphs(source: str | Path) -> Iterator[str]:
    """The lines of a text file that aren't blank, one by one."""
    return (line.strip() for _, line in _lines(Path(source)) if line.strip())


# --- columns ------------------------------------------------------------------------------------------


def _text(where: str, columns: Mapping[str, Any], column: str) -> str:
    if column not in columns:
        raise DataInvalid(f"{where}: there is no column {column!r}; the columns are: {_names(columns)}")
    text = columns[column]
    if not isinstance(text, str):
        raise DataInvalid(f"{where}, column {column!r}: expected a text, found {_kind(text)}")
    if not text.strip():
        raise DataInvalid(f"{where}, column {column!r}: the text is empty")
    _check_unicode(where, column, text)
    return text


def _label(where: str, columns: Mapping[str, Any], column: str | None, labels: Collection[str] | None) -> str | None:
    value = None if column is None else columns.get(column)
    if value is None:
        if labels is None:
            return None
        if column is not None and column in columns:
            raise DataInvalid(f"{where}, column {column!r}: the label is missing")
        raise DataInvalid(f"{where}: there is no label column {column!r}; the columns are: {_names(columns)}")
    if isinstance(value, bool) or not isinstance(value, str | Integral):
        raise DataInvalid(f"{where}, column {column!r}: a label is a word or an integer, not {_kind(value)}")
    label = str(value).strip()
    if not label:
        raise DataInvalid(f"{where}, column {column!r}: the label is empty")
    _check_unicode(where, column, label)
    if labels is not None and label not in labels:
        known = ", ".join(map(str, labels))
        raise DataInvalid(
            f"{where}, column {column!r}: label {label[:40]!r} is unknown; the task's labels are: {known}"
        )
    return label


def _check_unicode(where: str, column: str | None, text: str) -> None:
    """JSON can spell half a character (a lone surrogate), which no tokenizer takes and no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataInvalid(f"{where}, column {column!r}: half a character at place {error.start + 1}") from error


def _names(columns: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in columns) or "none"


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


# --- sources ------------------------------------------------------------------------------------------


def _open(
    source: str | Path | Iterable[Mapping[str, Any]], label_column: str | None, format: Format | None
) -> Iterator[Place]:
    if isinstance(source, str | Path):
        path = Path(source)
        found = format or _format(path)
        if found not in _READERS:
            raise DataInvalid(f"{path.name}: plain text has no rows; give .jsonl, .csv or .parquet")
        return _READERS[found](path)
    if isinstance(source, Mapping):
        names = ", ".join(str(name) for name in source)
        raise DataInvalid(f"the data set has several splits; pass one of them: {names}")
    return _mappings(source, label_column)


def _format(path: Path) -> Format:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in FORMATS:
        raise DataInvalid(f"{path.name}: unknown kind of file; known are: {', '.join(FORMATS)} (and .gz of them)")
    return FORMATS[suffix]


def _mappings(source: Iterable[Mapping[str, Any]], label_column: str | None) -> Iterator[Place]:
    """Mappings, or a ``datasets.Dataset``, whose class labels are numbers with names."""
    feature = (getattr(source, "features", None) or {}).get(label_column)
    names: list[str] | None = getattr(feature, "names", None)
    for number, columns in enumerate(source, start=1):
        where = f"row {number}"
        if not isinstance(columns, Mapping):
            raise DataInvalid(f"{where}: expected named columns, found {_kind(columns)}")
        value = None if names is None else columns.get(str(label_column))
        if names is not None and isinstance(value, Integral):
            at = int(value)
            columns = {**columns, str(label_column): names[at] if 0 <= at < len(names) else None}
        yield where, columns


def _jsonl(path: Path) -> Iterator[Place]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            columns = json.loads(line)
        except (ValueError, RecursionError) as error:
            at = f", character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataInvalid(f"{where}{at}: not a line of JSON") from error
        if not isinstance(columns, dict):
            raise DataInvalid(f'{where}: expected an object like {{"text": …, "label": …}}, found {_kind(columns)}')
        yield where, columns


def _separated(path: Path, delimiter: str) -> Iterator[Place]:
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        twice = [a for a, b in pairwise(sorted(header)) if a == b]
        if twice:
            raise DataInvalid(f"{path.name}, line 1: column {twice[0]!r} stands there twice")
        for cells in reader:
            where = f"{path.name}, line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataInvalid(f"{where}: {len(cells)} cells, but the header has {len(header)} columns")
            yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataInvalid(f"{path.name}, line {reader.line_num}: {error}") from error


def _csv(path: Path) -> Iterator[Place]:
    return _separated(path, ",")


def _tsv(path: Path) -> Iterator[Place]:
    return _separated(path, "\t")


def _parquet(path: Path) -> Iterator[Place]:
    import pyarrow as arrow  # slow to import, and only this kind of file needs it
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


_READERS: dict[str, Callable[[Path], Iterator[Place]]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
}


# --- lines --------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of UTF-8 text, line end kept, gzip undone."""
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
        raise DataInvalid(f"{path.name}, after line {number}: the gzip file is damaged or cut off") from error
    except OSError as error:
        raise DataInvalid(f"{path}: can't be read: {error.strerror or error}") from error


def _binary(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if compressed else path.open("rb")  # type: ignore[return-value]
