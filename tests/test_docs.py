"""The documents say what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"])


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
