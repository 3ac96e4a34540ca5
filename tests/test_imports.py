"""Imports go one way, and the processes that answer requests stay free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "post_shared": ROOT / "shared" / "post_shared",
    "post_client": ROOT / "client" / "post_client",
    "post_server": ROOT / "server" / "post_server",
    "post_bench": ROOT / "benchmarks" / "post_bench",
}
FORBIDDEN = {
    "post_shared": {"post_bench", "post_client", "post_server", "fastapi", "celery", "redis", "sqlalchemy", "opacus"},
    "post_client": {"post_bench", "post_server", "fastapi", "celery", "redis", "sqlalchemy"},
    "post_server": {"post_bench", "post_client", "opacus"},
    "post_bench": {"fastapi", "celery", "redis", "sqlalchemy"},
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "opacus", "datasets"}
LIGHT = (
    "post_shared.schemas",
    "post_shared.errors",
    "post_shared.prompt_file",
    "post_shared.model_files",
    "post_server.settings",
    "post_server.records",
    "post_server.storage",
    "post_server.keys",
    "post_server.api",
    "post_server.jobs",
    "post_server.worker.supervisor",
    "post_server.predictor.transport",
)
"""Modules, or packages with all that is in them, that run where no torch may be."""


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        assert package in found
    return found


MODULES = _modules()


def _only_for_types(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def _statements(tree: ast.AST, *, lazy: bool) -> Iterator[ast.stmt]:
    """Import statements; those inside functions only when ``lazy``, those for type checkers never."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and _only_for_types(node):
            yield from (s for branch in node.orelse for s in _statements(branch, lazy=lazy))
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _statements(node, lazy=lazy)


def _imports(module: str, *, lazy: bool) -> set[str]:
    """Full names that a module imports: for ``from a import b`` both ``a`` and ``a.b``."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names: set[str] = set()
    for node in _statements(ast.parse(path.read_text("utf-8")), lazy=lazy):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return names


def _tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def _closure(module: str) -> dict[str, str]:
    """Project modules loaded by importing ``module``, each with the one that asked for it."""
    reached = {module: "the start"}
    queue = [module]
    while queue:
        current = queue.pop()
        parts = current.split(".")
        parents = {".".join(parts[:n]) for n in range(1, len(parts))}
        for name in (_imports(current, lazy=False) | parents) & MODULES.keys():
            if name not in reached:
                reached[name] = current
                queue.append(name)
    return reached


def _light_modules() -> list[str]:
    return sorted(m for m in MODULES if any(m == light or m.startswith(f"{light}.") for light in LIGHT))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    """A side never reaches for the other side's libraries, not even inside a function."""
    wrong = _tops(_imports(module, lazy=True)) & FORBIDDEN[module.split(".")[0]]
    assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", _light_modules())
def test_light_modules_reach_no_torch(module: str) -> None:
    """Following the imports made at import time, nothing heavy is reached."""
    for reached, asked_by in _closure(module).items():
        heavy = _tops(_imports(reached, lazy=False)) & HEAVY
        assert not heavy, f"{module} reaches {reached} (imported by {asked_by}), which imports {sorted(heavy)}"


def test_api_process_has_no_torch(tmp_path: Path) -> None:
    """The real thing: a fresh interpreter imports all light modules and builds the app."""
    code = f"""
import importlib, os, sys
os.environ["POST_HOME"] = {str(tmp_path)!r}
for name in {_light_modules()!r}:
    importlib.import_module(name)
loaded = sorted({HEAVY!r} & sys.modules.keys())
sys.exit("loaded: " + ", ".join(loaded) if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", sorted(MODULES))
def test_annotations_are_lazy(module: str) -> None:
    """Every module that holds more than its docstring defers annotations."""
    body = ast.parse(MODULES[module].read_text("utf-8")).body
    code = [node for node in body if not isinstance(node, ast.Expr)]
    assert not code or (isinstance(code[0], ast.ImportFrom) and code[0].module == "__future__")
