"""Datasets: every line is checked, and nothing of an invalid file is stored."""

from __future__ import annotations

import gzip
import hashlib

import pytest

from tests.server.http_harness import ROWS, HttpHarness, code

INVALID = {
    "empty": (b"", "empty"),
    "blank": (b"\n\n", "empty"),
    "no JSON": (ROWS + b"{text: fine}\n", "line 3"),
    "a list": (ROWS + b'["fine", "positive"]\n', "line 3"),
    "no text": (b'{"label": "positive"}\n', "line 1"),
    "an empty text": (ROWS + b'{"text": " ", "label": "positive"}\n', "line 3"),
    "a number for a text": (b'{"text": 5}\n', "line 1"),
    "not UTF-8": (ROWS + b'{"text": "\xff\xfe"}\n', "line 3"),
    "half a character": (ROWS + b'{"text": "fine \\ud800"}\n', "line 3"),
    "half a character in a label": (b'{"text": "fine", "label": "\\ud800"}\n', "line 1"),
    "half a character in a name": (b'{"\\ud800": "fine"}\n', "line 1"),
    "half labelled": (ROWS + b'{"text": "fine"}\n', "1 of 3 rows"),
    "compressed": (gzip.compress(ROWS), "compressed"),
    "deeply nested": (b"[" * 100_000, "line 1"),
}


@pytest.mark.parametrize("kind", INVALID)
def test_an_invalid_line_is_named_and_nothing_is_stored(http_harness: HttpHarness, kind: str) -> None:
    content, expected = INVALID[kind]
    before = http_harness.everything()
    answer = http_harness("provider", "POST", "/v1/datasets?name=public&kind=rows", content=content)
    assert code(answer) == (422, "data_invalid")
    assert expected in answer.json()["detail"]
    assert "tmp" not in answer.json()["detail"]
    assert http_harness.everything() == before


def test_rows_are_counted_and_their_labels_found(http_harness: HttpHarness) -> None:
    params = {"name": "public", "kind": "rows", "licence": "CC-BY-4.0"}
    answer = http_harness("provider", "POST", "/v1/datasets", params=params, content=ROWS)
    assert answer.status_code == 201
    dataset = answer.json()
    assert (dataset["rows"], dataset["labels"], dataset["licence"]) == (2, ["negative", "positive"], "CC-BY-4.0")
    assert dataset["sha256"] == hashlib.sha256(ROWS).hexdigest()
    assert http_harness.store.read(dataset["sha256"]) == ROWS
    for reference in ("public", dataset["id"]):
        assert http_harness("alice", "GET", f"/v1/datasets/{reference}").json() == dataset
    assert http_harness("alice", "GET", "/v1/datasets").json()["items"] == [dataset]


def test_free_text_labels_are_not_listed(http_harness: HttpHarness) -> None:
    content = b"".join(b'{"text": "who", "label": "answer %d"}\n' % n for n in range(1200))
    http_harness.add_dataset("answers", content)
    assert http_harness("alice", "GET", "/v1/datasets/answers").json()["labels"] == []


def test_a_corpus_has_one_paragraph_per_line(http_harness: HttpHarness) -> None:
    http_harness.add_dataset("prose", "One.\n\nTwo, with \u00e9.\nThree.".encode(), "corpus")
    dataset = http_harness("alice", "GET", "/v1/datasets/prose").json()
    assert (dataset["rows"], dataset["labels"]) == (3, None)


def test_a_name_is_unique(http_harness: HttpHarness) -> None:
    dataset = http_harness.add_dataset("public")
    same = http_harness("provider", "POST", "/v1/datasets?name=public&kind=rows", content=ROWS)
    assert (same.status_code, same.json()["id"]) == (200, dataset)
    before = http_harness.everything()
    other = http_harness("provider", "POST", "/v1/datasets?name=public&kind=rows", content=b'{"text": "other"}\n')
    assert code(other) == (409, "conflict")
    assert http_harness.everything() == before


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused_and_nothing_is_stored(
    limited_http_harness: HttpHarness, declared: bool
) -> None:
    http_harness, before = limited_http_harness, limited_http_harness.everything()
    content = ROWS * 2000 if declared else iter([ROWS] * 2000)
    answer = http_harness("provider", "POST", "/v1/datasets?name=public&kind=rows", content=content)
    assert code(answer) == (413, "payload_too_large")
    assert http_harness.everything() == before


def test_only_the_provider_uploads(http_harness: HttpHarness) -> None:
    assert code(http_harness("alice", "POST", "/v1/datasets?name=x&kind=rows", content=ROWS)) == (403, "forbidden")
    assert code(http_harness(None, "POST", "/v1/datasets?name=x&kind=rows", content=ROWS)) == (401, "unauthenticated")


@pytest.mark.parametrize(
    "query", ["name=Public&kind=rows", "name=..&kind=rows", "kind=rows", "name=x&kind=zip", "name=x"]
)
def test_a_bad_query_is_refused(http_harness: HttpHarness, query: str) -> None:
    assert code(http_harness("provider", "POST", f"/v1/datasets?{query}", content=ROWS)) == (422, "invalid_input")


def test_a_preview_shows_the_first_rows(http_harness: HttpHarness) -> None:
    lines = [b'{"text": "%s", "label": %d}' % (b"a" * n, n) for n in range(1, 40)]
    http_harness.add_dataset("rows", b"\xef\xbb\xbf" + b"\n\n".join(lines))
    shown = http_harness("bob", "GET", "/v1/datasets/rows/preview").json()
    assert shown["items"] == [{"text": "a" * n, "label": str(n)} for n in range(1, 11)]
    assert len(http_harness("bob", "GET", "/v1/datasets/rows/preview?rows=100").json()["items"]) == 39
    http_harness.add_dataset("prose", b"One.\n\n  Two.\n" + b"x" * 5000, "corpus")
    items = http_harness("bob", "GET", "/v1/datasets/prose/preview?rows=3").json()["items"]
    assert items == [{"text": text, "label": None} for text in ("One.", "Two.", "x" * 2000)]
    for rows in (0, 101, "x"):
        assert code(http_harness("bob", "GET", f"/v1/datasets/rows/preview?rows={rows}")) == (422, "invalid_input")
    assert code(http_harness("bob", "GET", "/v1/datasets/none/preview")) == (404, "not_found")


def test_a_preview_reads_no_more_than_it_shows(http_harness: HttpHarness) -> None:
    http_harness.add_dataset("rows", b"".join(b'{"text": "row %d"}\n' % n for n in range(100_000)))
    read = 0
    open_blob = http_harness.app.state.context.store.open

    def counted(sha256: str):  # type: ignore[no-untyped-def]
        nonlocal read
        for chunk in open_blob(sha256):
            read += len(chunk)
            yield chunk

    http_harness.app.state.context.store.open = counted
    assert http_harness("bob", "GET", "/v1/datasets/rows/preview").json()["items"][9] == {
        "text": "row 9",
        "label": None,
    }
    assert 0 < read <= 2**20
