"""Workers on several hosts: network namespaces of this machine, whose cables are cut and restored."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.server.backing import check_external_services, skip_or_fail


@pytest.fixture
def can_make_hosts() -> None:
    check_external_services()
    skip_or_fail([name for name in ("ip", "unshare") if not shutil.which(name)], "the test of several hosts")
    commands = "ip netns add post-try && ip netns del post-try && ip link add post-try type veth peer name post-tried"
    result = subprocess.run(["unshare", "--net", "sh", "-c", commands], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"network namespaces can't be created here: {result.stderr.strip()}")


@pytest.mark.slow
@pytest.mark.usefixtures("can_make_hosts")
def test_a_disconnected_worker_does_no_harm_and_works_again() -> None:
    scenario = ["unshare", "--net", sys.executable, "-m", "tests.server.worker.several_hosts"]
    result = subprocess.run(scenario, env=os.environ, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-4000:]}"
