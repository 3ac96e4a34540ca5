"""The demo's data sets: private film reviews, public product reviews, a public corpus."""

from __future__ import annotations

import csv
import html
import io
import json
import random
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from post_client.demo.settings import DemoSettings
from post_shared.data.rows import Row
from post_shared.errors import DataInvalid

POSITIVE, NEGATIVE = "positive", "negative"
CLEAR = 1.0
"""Mean score (-4 to 4) from which a snippet counts as clearly positive or negative."""
LEAST_LETTERS = 4
PARAGRAPH = 600
"""Letters of a paragraph of news prose."""


@dataclass(frozen=True)
class DemoTexts:
    """``train`` and ``test`` are private and share no text; ``public`` and ``corpus`` are the provider's."""

    train: list[Row]
    test: list[Row]
    public: list[Row]
    corpus: list[str]


def make_texts(snippets: dict[str, str], news: str, settings: DemoSettings) -> DemoTexts:
    """Cut the fetched files into the demo's data sets; the same seed gives the same sets."""
    films = labelled(snippets["movieReviewSnippets"])
    products = labelled(snippets["amazonReviewSnippets"])
    prose = paragraphs(news, settings.news_paragraphs, settings.seed)
    for name in ("amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
        prose += [text for _, text in scored(snippets[name])]
    return split(films, products, prose, settings)


def split(films: list[Row], products: list[Row], prose: list[str], settings: DemoSettings) -> DemoTexts:
    """Shuffle by the seed; films are told apart before they are split, so no text is in both halves."""
    films, products = distinct(films), distinct(products)
    private = {_plain(row.text) for row in films}
    generator = random.Random(settings.seed)  # noqa: S311  a split, no secret
    corpus = [text for text in prose if _plain(text) not in private]
    products = [row for row in products if _plain(row.text) not in private]
    for rows in (films, products):
        generator.shuffle(rows)
    generator.shuffle(corpus)
    test, train = films[: settings.test_rows], films[settings.test_rows :][: settings.train_rows]
    if len(test) < settings.test_rows or len(train) < 2:
        raise DataInvalid(f"there are only {len(films)} distinct private rows; {settings.test_rows} are for the test")
    return DemoTexts(train, test, products[: settings.public_rows], corpus)


def scored(table: str) -> Iterable[tuple[float, str]]:
    """Lines of ``id <tab> score <tab> text``; those that are not such a line are left out."""
    for line in table.splitlines():
        parts = line.split("\t", 2)
        if len(parts) == 3:
            text = " ".join(html.unescape(parts[2]).split())
            if len(text) >= LEAST_LETTERS:
                yield float(parts[1]), text


def labelled(table: str) -> list[Row]:
    """The clearly positive and the clearly negative snippets."""
    return [Row(text, POSITIVE if score > 0 else NEGATIVE) for score, text in scored(table) if abs(score) >= CLEAR]


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Each text once, case and punctuation aside."""
    return list({_plain(row.text): row for row in reversed(rows)}.values())[::-1]


def paragraphs(news: str, count: int, seed: int) -> list[str]:
    """``count`` paragraphs of the articles' text, drawn by the seed."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    found: list[str] = []
    for article in csv.DictReader(io.StringIO(news)):
        piece = ""
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join((article.get("text") or "").split())):
            piece = f"{piece} {sentence}".strip()
            if len(piece) >= PARAGRAPH:
                found.append(piece)
                piece = ""
    random.Random(seed).shuffle(found)  # noqa: S311  public prose
    return found[:count]


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """JSON Lines with ``text`` and ``label``."""
    lines = (json.dumps({"text": row.text, "label": row.label}, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def write_corpus(path: Path, paragraphs: Iterable[str]) -> Path:
    """One paragraph a line."""
    path.write_text("\n".join(" ".join(each.split()) for each in paragraphs) + "\n", "utf-8")
    return path


def _plain(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())
