"""The measurable house rules of CONTRIBUTING.md, and two on which security depends."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path for side in ("server", "client", "shared", "benchmarks/post_bench") for path in (ROOT / side).rglob("*.py")
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
UNSAFE = re.compile(
    r"\btorch\.load\(|^\s*(?:import|from) (?:pickle|dill|joblib)\b|trust_remote_code=True", re.MULTILINE
)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body, without the docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_modules_and_functions_are_short(path: Path) -> None:
    """At most 300 lines per module and 40 per function."""
    source = path.read_text("utf-8")
    assert source.count("\n") <= 300
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]
    long = {function.name: _lines(function) for function in functions if _lines(function) > 40}
    assert not long


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_modules_have_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_nothing_is_unpickled_and_no_remote_code_is_run(path: Path) -> None:
    assert not UNSAFE.search(path.read_text("utf-8"))
