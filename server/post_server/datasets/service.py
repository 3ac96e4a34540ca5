"""Stored public datasets: a row and one blob of JSON Lines or plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from post_server.db.database import guard
from post_server.db.tables import DatasetRow
from post_server.storage.blob_store import BlobStore
from post_shared.data.rows import iter_paragraphs, iter_rows, read_corpus
from post_shared.errors import Conflict, DataInvalid, InvalidInput, NotFound
from post_shared.files.model_folder import sha256_of
from post_shared.schemas.datasets import Dataset, DatasetKind, PreviewRow

MAX_LABELS = 1000
"""With more distinct labels, the labels are free text and aren't listed."""
_PREVIEW_CHARACTERS = 2000
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Summary:
    """What checking all lines of a dataset finds."""

    rows: int
    labels: list[str] | None
    sha256: str
    size: int


def summarise(path: Path, kind: DatasetKind) -> Summary:
    """Check a file line by line, in constant memory.

    Raises:
        DataInvalid: names the line and the column of the first error.
    """
    with path.open("rb") as stream:
        if stream.read(2) == _GZIP:
            raise DataInvalid("the dataset is compressed; send it uncompressed")
    try:
        rows, labels = _count_rows(path) if kind is DatasetKind.ROWS else (sum(1 for _ in iter_paragraphs(path)), None)
    except DataInvalid as error:
        raise DataInvalid(error.detail.replace(str(path), path.name).replace(path.name, "the dataset")) from None
    if rows == 0:
        raise DataInvalid("the dataset is empty")
    return Summary(rows, labels, sha256_of(path), path.stat().st_size)


def add_dataset(
    session: Session,
    store: BlobStore,
    temporary: Path,
    summary: Summary,
    *,
    name: str,
    kind: DatasetKind,
    licence: str | None = None,
) -> tuple[DatasetRow, bool]:
    """Store a checked file from :meth:`BlobStore.new_file` and add its row.

    Returns:
        The row, and whether it is new: the same data under the same name returns the existing row.

    Raises:
        Conflict: the name belongs to another dataset.
    """
    guard(session)
    existing = session.scalar(select(DatasetRow).where(DatasetRow.name == name))
    if existing is not None and existing.sha256 == summary.sha256 and existing.kind is kind:
        return existing, False
    check_name_is_free(session, name)
    row = DatasetRow(
        name=name,
        kind=kind,
        rows=summary.rows,
        labels=summary.labels,
        licence=licence,
        sha256=store.adopt(temporary, summary.sha256),
        size_bytes=summary.size,
    )
    session.add(row)
    session.flush()
    return row, True


def check_name_is_free(session: Session, name: str) -> None:
    """Raise :class:`Conflict` if a dataset has that name."""
    existing = session.scalar(select(DatasetRow.id).where(DatasetRow.name == name))
    if existing is not None:
        raise Conflict(f"A dataset named {name!r} ({existing}) already exists; choose another name.")


def copy_as_dataset(source: Path, kind: DatasetKind, target: Path) -> None:
    """Write a file in any format that POST reads (JSONL, CSV, Parquet, text; also .gz) as a plain dataset."""
    with target.open("w", encoding="utf-8", newline="\n") as output:
        if kind is DatasetKind.CORPUS:
            output.writelines(f"{' '.join(text.split())}\n" for text in read_corpus(source))
            return
        for row in iter_rows(source):
            document = {"text": row.text} | ({} if row.label is None else {"label": row.label})
            output.write(json.dumps(document, ensure_ascii=False) + "\n")


def find_dataset(session: Session, reference: str) -> DatasetRow:
    """The dataset with that id or name.

    Raises:
        NotFound: there is none.
    """
    row = session.scalar(select(DatasetRow).where(or_(DatasetRow.id == reference, DatasetRow.name == reference)))
    if row is None:
        raise NotFound(f"There is no dataset {reference!r}.", dataset=reference)
    return row


def first_rows(store: BlobStore, row: DatasetRow, count: int) -> list[PreviewRow]:
    """The dataset's first rows or paragraphs; the rest of the blob isn't read."""
    rows: list[PreviewRow] = []
    for line in _lines(store.open(row.sha256)):
        if not line.strip():
            continue
        rows.append(_preview(line.decode("utf-8-sig" if not rows else "utf-8"), row.kind))
        if len(rows) == count:
            break
    return rows


def _preview(line: str, kind: DatasetKind) -> PreviewRow:
    """A preview of a line that :func:`summarise` has checked."""
    if kind is DatasetKind.CORPUS:
        return PreviewRow(text=line.strip()[:_PREVIEW_CHARACTERS])
    columns = json.loads(line)
    label = columns.get("label")
    return PreviewRow(text=columns["text"][:_PREVIEW_CHARACTERS], label=None if label is None else str(label).strip())


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


def check_labelled(row: DatasetRow) -> None:
    """Raise :class:`InvalidInput` if the dataset has no labels."""
    if row.kind is not DatasetKind.ROWS or row.labels is None:
        raise InvalidInput(f"The dataset {row.name} has no labels, which are needed here.")


def dataset_document(row: DatasetRow) -> Dataset:
    """The row as the API shows it."""
    return Dataset.model_validate({name: getattr(row, name) for name in Dataset.model_fields})


def _count_rows(path: Path) -> tuple[int, list[str] | None]:
    rows, labelled = 0, 0
    labels: set[str] = set()
    for row in iter_rows(path, format="jsonl"):
        rows += 1
        if row.label is not None:
            labelled += 1
            if len(labels) <= MAX_LABELS:
                labels.add(row.label)
    if labelled not in (0, rows):
        raise DataInvalid(f"{rows - labelled} of {rows} rows have no label; label all of them or none")
    if not labelled:
        return rows, None
    return rows, [] if len(labels) > MAX_LABELS else sorted(labels)
