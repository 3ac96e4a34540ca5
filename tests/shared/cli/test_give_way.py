"""Two commands on the same cores: the threads of neither wait by keeping the cores busy for long."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from post_shared.cli.app import SPINS, give_way


@pytest.mark.parametrize(
    ("given", "spins"), [({}, SPINS), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_what_somebody_has_set_stays(given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    give_way()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_the_command_says_so_before_torch_is_there() -> None:
    work = """if True:
        import os, sys, post_shared.cli.app as cli
        cli.run = lambda app: "torch" not in sys.modules and os.environ.get("GOMP_SPINCOUNT") == cli.SPINS
        cli.main()
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    assert subprocess.run([sys.executable, "-c", work], env=clean, check=False).returncode == 1
