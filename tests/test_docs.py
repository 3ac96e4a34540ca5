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
    assert spec is not None and spec.loader is not None
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


def _commands() -> set[str]:
    return set(re.findall(r"^### `post ([a-z -]+)`$", (ROOT / "docs" / "reference-cli.md").read_text("utf-8"), re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_code_blocks_exist(page: Path) -> None:
    """Every ``post VERB`` in a code block is a command, and its long options are that command's."""
    reference = (ROOT / "docs" / "reference-cli.md").read_text("utf-8")
    known = _commands()
    for block in re.findall(r"```[a-z]*\n(.*?)```", page.read_text("utf-8"), re.S):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            found = re.match(r"\s*(?:\$ )?(?:\.venv/bin/)?post ([a-z][a-z -]*?)(?=\s+[^a-z\s]|\s*$|\s+[a-z]+[./_]|\s)", line)
            if not found:
                continue
            words = line[found.start(1) :].split()
            verb = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
            assert verb in known, f"{page.name}: {line.strip()}"
            section = reference.split(f"### `post {verb}`\n")[1].split("\n### ")[0]
            for option in re.findall(r"\s(--[a-z-]+)", line.split("#")[0]):
                assert f"`{option}`" in section, f"{page.name}: {option} in {line.strip()}"


def test_picture_is_svg_for_light_and_dark() -> None:
    path = ROOT / "docs" / "three-steps.svg"
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert "prefers-color-scheme: dark" in path.read_text("utf-8")
