"""What holds for every test: few threads, no network, and the same examples on every run in CI."""

from __future__ import annotations

import os

# Before any library reads them. The machine's cores are shared by the processes that some tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # set for the processes that run tests side by side; a console made then would keep it

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backing",
        choices=("embedded", "real"),
        default="embedded",
        help="what the servers of tests stand on; real: Redis, PostgreSQL and S3, and only the tests of servers run",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whole journeys first: of two processes, none is left with them at the end. On the real parts, leave out what
    wouldn't notice them."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)
    if config.getoption("--backing") == "real":
        kept = [item for item in items if "backing" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(autouse=True)
def own_ledger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test has a privacy ledger of its own; nobody's real one is touched."""
    with tempfile.TemporaryDirectory(prefix="post-ledger-") as folder:
        monkeypatch.setenv("POST_LEDGER", str(Path(folder) / "ledger.db"))
        monkeypatch.delenv("POST_PRECISION", raising=False)
        monkeypatch.delenv("POST_EPSILON_CAP", raising=False)
        yield Path(folder) / "ledger.db"
