"""The documents say what the code does."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        *(ROOT / ".github").glob("*.md"),
    ]
)


def _tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = _tables()


@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_generated_tables_are_up_to_date(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``make docs`` would change nothing."""
    monkeypatch.setenv("POST_HOME", str(tmp_path))
    file, make = tables.TABLES[name]
    page = (ROOT / "docs" / file).read_text("utf-8")
    assert tables.filled(page, name, make()) == page, "run: make docs"


# --- measured figures ---------------------------------------------------------------------------------

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
BLOCKS = list(tables.results_blocks())
FACTS = ("command", "commit", "date", "machine", "note")


@pytest.mark.parametrize(("file", "name"), BLOCKS, ids=[name for _, name in BLOCKS])
def test_measured_tables_are_up_to_date(file: str, name: str) -> None:
    """``make docs`` would change nothing."""
    page = (ROOT / "docs" / file).read_text("utf-8")
    assert tables.filled(page, f"results/{name}", tables.results_table(name)) == page, "run: make docs"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_measured_table_has_its_facts(path: Path) -> None:
    """A figure without its command, commit, date, machine and spread means nothing."""
    document = json.loads(path.read_text("utf-8"))
    assert all(isinstance(document[fact], str) and document[fact] for fact in FACTS)
    assert re.search(r"\d{4}-\d{2}-\d{2}", document["date"])
    assert tables.Result.read(path).title == document["title"]


def test_every_results_file_is_shown() -> None:
    assert {name for _, name in BLOCKS} == {path.stem for path in RESULTS}


def test_the_readme_shows_one_measured_table() -> None:
    assert len([name for file, name in BLOCKS if file == "../README.md"]) == 1


@pytest.mark.parametrize("file", tables.RESULTS_PAGES)
def test_no_accuracy_is_typed_by_hand(file: str) -> None:
    """What has three decimals stands between the markers of a measured table."""
    page = (ROOT / "docs" / file).read_text("utf-8")
    by_hand = re.sub(r"<!-- begin: (results/\S+) -->.*?<!-- end: \1 -->", "", page, flags=re.S)
    assert re.findall(r"\b0\.\d{3}\b", by_hand) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"machine": None}, "must have"),
        ({"commit": ""}, "commit may not be empty"),
        ({"rows": [["POST"]]}, "2 cells"),
    ],
    ids=["missing", "empty", "ragged"],
)
def test_a_results_file_without_its_facts_is_refused(change: dict[str, object], said: str, tmp_path: Path) -> None:
    whole = dict.fromkeys(("title", *FACTS), "x") | {"columns": ["a", "b"], "rows": [["POST", 0.840]]}
    path = tmp_path / "made.json"
    path.write_text(json.dumps({name: value for name, value in (whole | change).items() if value is not None}))
    with pytest.raises(ValueError, match=said):
        tables.Result.read(path)


def test_figures_keep_their_digits(tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    facts = ", ".join(f'"{fact}": "{fact}"' for fact in ("title", *FACTS))
    path.write_text(f'{{{facts}, "columns": ["a", "b", "c"], "rows": [[0.840, 100, null]]}}')
    assert "| 0.840 | 100 |  |" in tables.Result.read(path).markdown()


# --- links, commands, the picture ---------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        link = "".join(target).split("#")[0]
        if link and not link.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def _command_lines(page: Path) -> list[list[str]]:
    """The words after ``post`` of each such line in a code block; comments are left out."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", page.read_text("utf-8"), re.S)
    lines = [line.split("#")[0] for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    found = [re.search(r"(?:^|\s)post ([a-z].*)", line) for line in lines]
    return [match[1].split() for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_code_blocks_exist(page: Path) -> None:
    """Every ``post VERB`` in a code block is a command, and its long options are that command's."""
    reference = (ROOT / "docs" / "reference-cli.md").read_text("utf-8")
    sections = {part.split("`")[0]: part for part in reference.split("### `post ")[1:]}
    for words in _command_lines(page):
        verb = next((verb for verb in (" ".join(words[:2]), words[0]) if verb in sections), None)
        assert verb is not None, f"{page.name}: post {' '.join(words)}"
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            assert f"`{option}`" in sections[verb], f"{page.name}: {option} in post {' '.join(words)}"


def test_picture_is_svg_for_light_and_dark() -> None:
    path = ROOT / "docs" / "three-steps.svg"
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert "prefers-color-scheme: dark" in path.read_text("utf-8")
