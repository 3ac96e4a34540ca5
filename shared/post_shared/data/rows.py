"""Rows and corpora from JSON Lines, CSV, Parquet and Hugging Face ``datasets``.

A data set becomes a list of :class:`Row`. Every error names the file, the line and the column, and never
quotes a text: the text may be private.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from post_shared.data.readers import MAX_LINE, Format, format_of, kind_of, numbered_lines, read_columns
from post_shared.errors import DataInvalid

__all__ = ["MAX_LINE", "Row", "iter_paragraphs", "iter_rows", "read_corpus", "read_rows"]


@dataclass(frozen=True)
class Row:
    """One example: a text and, if known, its label (or, for generation, its answer)."""

    text: str
    label: str | None = None
    user: str | None = None
    """Who wrote it, for user-level privacy; it never leaves this machine."""


def read_rows(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    text_column: str = "text",
    label_column: str | None = "label",
    user_column: str | None = None,
    labels: Collection[str] | None = None,
    format: Format | None = None,
) -> list[Row]:
    """All rows of a file (.jsonl, .csv, .tsv, .parquet; gzip is recognised), a ``datasets.Dataset``, or mappings.

    Args:
        label_column: None ignores labels. If the column is missing, rows have no labels.
        user_column: if given, every row must name its user there.
        labels: if given, every row must have one of these labels.
        format: the file's format; by default its name decides.

    Raises:
        DataInvalid: names the file, the line (or row) and the column.
    """
    rows = list(
        iter_rows(
            source,
            text_column=text_column,
            label_column=label_column,
            user_column=user_column,
            labels=labels,
            format=format,
        )
    )
    if not rows:
        name = Path(source).name if isinstance(source, str | Path) else "the data set"
        raise DataInvalid(f"{name}: there are no rows")
    return rows


def iter_rows(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    text_column: str = "text",
    label_column: str | None = "label",
    user_column: str | None = None,
    labels: Collection[str] | None = None,
    format: Format | None = None,
) -> Iterator[Row]:
    """The rows of :func:`read_rows` one by one, for files that don't fit in memory."""
    for where, columns in read_columns(source, label_column, format):
        text = _text(where, columns, text_column)
        label = _label(where, columns, label_column, labels)
        yield Row(text, label, None if user_column is None else _user(where, columns, user_column))


def read_corpus(source: str | Path, *, text_column: str = "text", format: Format | None = None) -> list[str]:
    """The paragraphs of a text file (one per line, without blank lines), or the texts of a file of rows.

    Raises:
        DataInvalid: the file is unreadable or empty; names the file and the line.
    """
    path = Path(source)
    if (format or format_of(path)) != "txt":
        return [row.text for row in read_rows(path, text_column=text_column, label_column=None, format=format)]
    paragraphs = list(iter_paragraphs(path))
    if not paragraphs:
        raise DataInvalid(f"{path.name}: it contains no text")
    return paragraphs


def iter_paragraphs(source: str | Path) -> Iterator[str]:
    """The non-blank lines of a text file, one by one."""
    return (line.strip() for _, line in numbered_lines(Path(source)) if line.strip())


# --- columns ------------------------------------------------------------------------------------------


def _text(where: str, columns: Mapping[str, Any], column: str) -> str:
    if column not in columns:
        raise DataInvalid(f"{where}: there is no column {column!r}; the columns are: {_names(columns)}")
    text = columns[column]
    if not isinstance(text, str):
        raise DataInvalid(f"{where}, column {column!r}: expected a text, found {kind_of(text)}")
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
        raise DataInvalid(f"{where}, column {column!r}: a label is a word or an integer, not {kind_of(value)}")
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


def _user(where: str, columns: Mapping[str, Any], column: str) -> str:
    if column not in columns:
        raise DataInvalid(f"{where}: there is no user column {column!r}; the columns are: {_names(columns)}")
    value = columns[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataInvalid(f"{where}, column {column!r}: the user is missing")
    if isinstance(value, bool) or not isinstance(value, str | Integral):
        raise DataInvalid(f"{where}, column {column!r}: a user is a name or an integer, not {kind_of(value)}")
    _check_unicode(where, column, str(value))
    return str(value).strip()


def _check_unicode(where: str, column: str | None, text: str) -> None:
    """JSON can contain half a character (a lone surrogate), which no tokenizer accepts and no file can store."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataInvalid(f"{where}, column {column!r}: lone surrogate at position {error.start + 1}") from error


def _names(columns: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in columns) or "none"
