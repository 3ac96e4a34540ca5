"""Every format gives the same rows; every error names the file, the line and the column."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_shared.data.rows import MAX_LINE, Row, read_corpus, read_rows
from post_shared.errors import DataInvalid

ROWS = [
    Row("a fine film", "positive"),
    Row('dull, "very" dull\nover two lines', "negative"),
    Row("été \u2028 naïve", "positive"),
]
TABLE = [{"text": row.text, "label": row.label} for row in ROWS]


def jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in TABLE), encoding="utf-8")
    return path


def separated(path: Path, delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(TABLE)
    return path


def parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TABLE), path)
    return path


def zipped(path: Path) -> Path:
    plain = jsonl(path.with_suffix(".plain"))
    path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "rows.jsonl": jsonl,
    "rows.ndjson": jsonl,
    "rows.csv": separated,
    "rows.tsv": lambda path: separated(path, "\t"),
    "rows.parquet": parquet,
    "rows.jsonl.gz": zipped,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name)
    assert read_rows(path) == ROWS
    assert read_rows(str(path), labels={"positive", "negative"}) == ROWS
    assert read_rows(path, label_column=None) == [Row(row.text) for row in ROWS]
    assert read_corpus(path) == [row.text for row in ROWS]


def test_objects_in_memory_give_the_same_rows() -> None:
    assert read_rows(TABLE) == ROWS
    assert read_rows(datasets.Dataset.from_list(TABLE)) == ROWS
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["negative", "positive"])
    )
    named = datasets.Dataset.from_list(TABLE, features=features)
    assert isinstance(named[0]["label"], int)
    assert read_rows(named) == ROWS
    assert read_rows(named.with_format("numpy")) == ROWS
    unnamed = named.cast_column("label", datasets.Value("int64")).with_format("numpy")
    assert [row.label for row in read_rows(unnamed)] == ["1", "0", "1"]


def test_a_data_set_with_splits_is_refused_and_names_them() -> None:
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(TABLE))
    with pytest.raises(DataInvalid, match="train"):
        read_rows(splits)


def test_numbers_are_labels_and_other_columns_are_ignored() -> None:
    assert read_rows([{"review": "nice", "stars": 5, "id": 7}], text_column="review", label_column="stars") == [
        Row("nice", "5")
    ]


def test_a_byte_order_mark_and_blank_lines_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\n\n  \n{"text": "two"}')
    assert read_rows(path) == [Row("one"), Row("two")]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1))
def test_texts_survive_json_lines_and_csv(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("texts")
    lines = folder / "rows.jsonl"
    lines.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    assert [row.text for row in read_rows(lines)] == texts
    plain = [text for text in texts if not {"\0", "\r"} & set(text)]
    if plain:
        table = folder / "rows.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["text"], *([text] for text in plain)])
        assert [row.text for row in read_rows(table)] == plain


BAD = {
    "invalid JSON": ("rows.jsonl", '{"text": "a"}\n{"text": oops}\n', r"rows.jsonl, line 2, character 10"),
    "not an object": ("rows.jsonl", '{"text": "a"}\n["a"]\n', r"rows.jsonl, line 2.*list"),
    "deep": ("rows.jsonl", "[" * 100_000, r"rows.jsonl, line 1"),
    "no text column": ("rows.jsonl", '{"txt": "a"}\n', r"line 1.*no column 'text'.*txt"),
    "text is a number": ("rows.jsonl", '{"text": 3}\n', r"line 1, column 'text'.*int"),
    "text is null": ("rows.jsonl", '{"text": null}\n', r"line 1, column 'text'.*nothing"),
    "text is empty": ("rows.jsonl", '{"text": "a"}\n\n{"text": " "}\n', r"line 3, column 'text'.*empty"),
    "label is a list": ("rows.jsonl", '{"text": "a", "label": ["x"]}\n', r"line 1, column 'label'.*list"),
    "label is a fraction": ("rows.jsonl", '{"text": "a", "label": 0.5}\n', r"line 1, column 'label'.*float"),
    "label is true": ("rows.jsonl", '{"text": "a", "label": true}\n', r"line 1, column 'label'.*bool"),
    "empty": ("rows.jsonl", "", r"rows.jsonl: there are no rows"),
    "header only": ("rows.csv", "text,label\n", r"rows.csv: there are no rows"),
    "CSV, no such column": ("rows.csv", "txt,label\na,b\n", r"rows.csv, line 2.*'text'.*txt, label"),
    "CSV, too many cells": ("rows.csv", "text,label\na,b\na,b,c\n", r"rows.csv, line 3.*3 cells.*2 columns"),
    "CSV, open quote": ("rows.csv", 'text,label\n"a,b\n', r"rows.csv, line 2"),
    "CSV, column twice": ("rows.csv", "text,text\na,b\n", r"rows.csv, line 1.*'text'.*twice"),
    "CSV, empty cell": ("rows.csv", "text,label\n,b\n", r"rows.csv, line 2, column 'text'"),
    "unknown kind": ("rows.xlsx", "x", r"rows.xlsx: unknown kind.*\.jsonl"),
    "text is not a table": ("rows.txt", "x", r"rows.txt.*no rows"),
    "not Parquet": ("rows.parquet", "PAR1", r"rows.parquet: not a Parquet file"),
    "damaged gzip": ("rows.jsonl.gz", "\x1f\x8b", r"rows.jsonl.gz"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_the_location(name: str, tmp_path: Path) -> None:
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataInvalid, match=message):
        read_rows(tmp_path / file)


def test_a_truncated_gzip_file_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "rows.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataInvalid, match="damaged or truncated"):
        read_rows(path)


def test_bytes_that_are_not_text_are_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataInvalid, match=r"line 2: not UTF-8 text \(byte 11\)"):
        read_rows(path)


def test_an_endless_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * (MAX_LINE + 1))
    with pytest.raises(DataInvalid, match="line 1: longer"):
        read_rows(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "corpus.txt"])
def test_a_missing_file_or_a_folder_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match=name):
        (read_corpus if name.endswith(".txt") else read_rows)(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(DataInvalid, match=name):
        (read_corpus if name.endswith(".txt") else read_rows)(tmp_path / name)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "no label column 'label'"),
        ({"text": "a", "label": None}, "column 'label': the label is missing"),
        ({"text": "a", "label": "meh"}, "'meh' is unknown.*negative, positive"),
    ],
)
def test_required_labels_are_required(row: dict[str, str | None], message: str) -> None:
    with pytest.raises(DataInvalid, match=f"row 2.*{message}"):
        read_rows([TABLE[0], row], labels=["negative", "positive"])


def test_an_error_does_not_quote_the_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "secret", "label": 0.5}\n')
    with pytest.raises(DataInvalid) as caught:
        read_rows(path)
    assert "secret" not in str(caught.value)


def test_a_corpus_is_one_paragraph_per_line(tmp_path: Path) -> None:
    plain = tmp_path / "corpus.txt"
    plain.write_text("first paragraph \n\n  second\n")
    packed = tmp_path / "corpus.txt.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_corpus(plain) == read_corpus(packed) == ["first paragraph", "second"]
    nameless = tmp_path / "blob"
    nameless.write_bytes(packed.read_bytes())
    assert read_corpus(nameless, format="txt") == ["first paragraph", "second"]
    plain.write_text(" \n")
    with pytest.raises(DataInvalid, match=r"corpus.txt.*contains no text"):
        read_corpus(plain)


def test_a_user_column_names_who_wrote_a_row(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text,label,who\nfine,positive,ann\ndull,negative, 7 \n")
    (tmp_path / "r.jsonl").write_text('{"text": "fine", "who": 7}\n{"text": "dull", "who": "ann"}\n')
    assert [row.user for row in read_rows(tmp_path / "r.csv", user_column="who")] == ["ann", "7"]
    assert [row.user for row in read_rows(tmp_path / "r.jsonl", user_column="who")] == ["7", "ann"]
    assert read_rows(tmp_path / "r.csv")[0].user is None
    for line, message in (
        ('{"text": "x"}', "no user column 'who'"),
        ('{"text": "x", "who": null}', "the user is missing"),
        ('{"text": "x", "who": " "}', "the user is missing"),
        ('{"text": "x", "who": 1.5}', "not float"),
        ('{"text": "x", "who": true}', "not bool"),
    ):
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(DataInvalid, match=f"line 1.*{message}"):
            read_rows(tmp_path / "bad.jsonl", user_column="who")
