"""Workers on several hosts: network namespaces of this machine, whose cables are cut and mended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.server.backing import check_real_parts, skip_or_fail


@pytest.fixture
def can_make_hosts() -> None:
    check_real_parts()
    skip_or_fail([name for name in ("ip", "unshare") if not shutil.which(name)], "a test of several hosts")
    inside = "ip netns add post-try && ip netns del post-try && ip link add post-try type veth peer name post-tried"
    made = subprocess.run(["unshare", "--net", "sh", "-c", inside], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces can be made here: {made.stderr.strip()}")


@pytest.mark.slow
@pytest.mark.usefixtures("can_make_hosts")
def test_a_cut_off_worker_does_no_harm_and_works_again() -> None:
    scenario = ["unshare", "--net", sys.executable, "-m", "tests.server.worker.several_hosts"]
    done = subprocess.run(scenario, env=os.environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
