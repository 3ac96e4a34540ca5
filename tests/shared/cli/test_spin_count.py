"""Two commands on the same cores: waiting threads of neither keep the cores busy for long."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from post_shared.cli.app import SPIN_COUNT, limit_spinning


@pytest.mark.parametrize(
    ("variables", "spins"), [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_variables_that_are_set_stay(
    variables: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    limit_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_the_command_limits_spinning_before_torch_is_loaded() -> None:
    script = """if True:
        import os, sys, post_shared.cli.app as cli
        cli.run = lambda app: "torch" not in sys.modules and os.environ.get("GOMP_SPINCOUNT") == cli.SPIN_COUNT
        cli.main()
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    assert subprocess.run([sys.executable, "-c", script], env=clean, check=False).returncode == 1
