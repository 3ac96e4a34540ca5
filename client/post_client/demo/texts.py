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
MIN_SCORE = 1.0
"""Snippets with a mean score (-4 to 4) of at least this magnitude are labelled positive or negative."""
MIN_CHARACTERS = 4
PARAGRAPH_CHARACTERS = 600
"""Minimum length of a news paragraph."""


@dataclass(frozen=True)
class DemoTexts:
    """``train`` and ``test`` are private and share no text; the provider has ``public`` and ``corpus``."""

    train: list[Row]
    test: list[Row]
    public: list[Row]
    corpus: list[str]


def make_texts(snippets: dict[str, str], news: str, settings: DemoSettings) -> DemoTexts:
    """Build the demo's data sets from the downloaded files; deterministic in the seed."""
    films = labelled(snippets["movieReviewSnippets"])
    products = labelled(snippets["amazonReviewSnippets"])
    prose = paragraphs(news, settings.news_paragraphs, settings.seed)
    for name in ("amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
        prose += [text for _, text in scored(snippets[name])]
    return split(films, products, prose, settings)


def split(films: list[Row], products: list[Row], prose: list[str], settings: DemoSettings) -> DemoTexts:
    """Shuffle and split. Duplicates are removed first, so train, test, public rows and corpus share no text.

    Raises:
        DataInvalid: there are too few distinct private rows.
    """
    films, products = distinct(films), distinct(products)
    private = {_normalized(row.text) for row in films}
    generator = random.Random(settings.seed)  # noqa: S311  for a split, not for security
    corpus = [text for text in prose if _normalized(text) not in private]
    products = [row for row in products if _normalized(row.text) not in private]
    for rows in (films, products):
        generator.shuffle(rows)
    generator.shuffle(corpus)
    test, train = films[: settings.test_rows], films[settings.test_rows :][: settings.train_rows]
    if len(test) < settings.test_rows or len(train) < 2:
        raise DataInvalid(
            f"there are only {len(films)} distinct private rows; {settings.test_rows} are needed for the test"
        )
    return DemoTexts(train, test, products[: settings.public_rows], corpus)


def scored(table: str) -> Iterable[tuple[float, str]]:
    """Scores and texts of lines ``id <tab> score <tab> text``; other lines are skipped."""
    for line in table.splitlines():
        parts = line.split("\t", 2)
        if len(parts) == 3:
            text = " ".join(html.unescape(parts[2]).split())
            if len(text) >= MIN_CHARACTERS:
                yield float(parts[1]), text


def labelled(table: str) -> list[Row]:
    """The clearly positive and clearly negative snippets."""
    return [Row(text, POSITIVE if score > 0 else NEGATIVE) for score, text in scored(table) if abs(score) >= MIN_SCORE]


def distinct(rows: Sequence[Row]) -> list[Row]:
    """The rows without duplicate texts, ignoring case and punctuation."""
    return list({_normalized(row.text): row for row in reversed(rows)}.values())[::-1]


def paragraphs(news: str, count: int, seed: int) -> list[str]:
    """``count`` random paragraphs of the articles; deterministic in the seed."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    pieces: list[str] = []
    for article in csv.DictReader(io.StringIO(news)):
        piece = ""
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join((article.get("text") or "").split())):
            piece = f"{piece} {sentence}".strip()
            if len(piece) >= PARAGRAPH_CHARACTERS:
                pieces.append(piece)
                piece = ""
    random.Random(seed).shuffle(pieces)  # noqa: S311  public prose
    return pieces[:count]


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    """Write JSON Lines with ``text`` and ``label``."""
    lines = (json.dumps({"text": row.text, "label": row.label}, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def write_corpus(path: Path, paragraphs: Iterable[str]) -> Path:
    """Write one paragraph per line."""
    path.write_text("\n".join(" ".join(each.split()) for each in paragraphs) + "\n", "utf-8")
    return path


def _normalized(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())
