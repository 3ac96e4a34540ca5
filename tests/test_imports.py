"""Processes that serve requests don't import torch, and annotations are lazy.

The direction of imports and the absence of cycles are import-linter contracts in pyproject.toml (`make lint`).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "post_shared": ROOT / "shared" / "post_shared",
    "post_client": ROOT / "client" / "post_client",
    "post_server": ROOT / "server" / "post_server",
    "post_bench": ROOT / "benchmarks" / "post_bench",
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "opacus", "datasets"}
LIGHT = (
    "post_shared.schemas.common",
    "post_shared.errors",
    "post_shared.files.prompt_file",
    "post_shared.files.model_folder",
    "post_server.settings",
    "post_server.db.tables",
    "post_server.storage.blob_store",
    "post_server.auth.keys",
    "post_server.api",
    "post_server.jobs",
    "post_server.worker.supervisor",
    "post_server.predictions.queue_client",
)
"""Modules, or packages with all their modules, that must not import torch."""


def _modules() -> dict[str, Path]:
    modules = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        assert package in modules
    return modules


MODULES = _modules()


def _light_modules() -> list[str]:
    return sorted(m for m in MODULES if any(m == light or m.startswith(f"{light}.") for light in LIGHT))


def test_api_process_has_no_torch(tmp_path: Path) -> None:
    """A new interpreter imports all light modules and builds the app."""
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
    """Every module with more than a docstring defers annotations."""
    body = ast.parse(MODULES[module].read_text("utf-8")).body
    code = [node for node in body if not isinstance(node, ast.Expr)]
    assert not code or (isinstance(code[0], ast.ImportFrom) and code[0].module == "__future__")
