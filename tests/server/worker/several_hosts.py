"""``unshare --net python -m tests.server.worker.several_hosts``: a provider whose workers are on hosts of their own.

The servers (PostgreSQL, Redis, S3) are in the network that this process was started in; each worker is in a network
namespace of its own, at the other end of a cable that can be cut. Nothing of it reaches another network.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from post_server.jobs import notifier
from post_server.settings import Settings
from post_shared.schemas.jobs import JobState
from tests.server.backing import real_backing
from tests.server.external_services import ObjectStore, Postgres
from tests.server.server_harness import ServerHarness, environment, job_processes, undisturbed, wait_for

SERVERS = "10.77.0.1"
_PATIENCE = 180.0


def ip(*words: object) -> None:
    """One command of iproute2."""
    subprocess.run(["ip", *map(str, words)], check=True)


class Host:
    """A network namespace with one cable to the servers."""

    def __init__(self, number: int) -> None:
        self.name, self.cable = f"post-{os.getpid()}-{number}", f"post{number}"
        here, there = f"10.77.{number}.1", f"10.77.{number}.2"
        ip("netns", "add", self.name)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("addr", "add", f"{here}/24", "dev", self.cable)
        ip("-n", self.name, "addr", "add", f"{there}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.name, "link", "set", device, "up")
        ip("-n", self.name, "route", "add", SERVERS, "via", here)
        self.mend()

    def cut(self) -> None:
        """Pull the cable: packets vanish, and nobody is told."""
        ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        """Plug it in again."""
        ip("link", "set", self.cable, "up")

    def start_worker(self, stage: ServerHarness) -> subprocess.Popen[bytes]:
        """A worker with a home folder of its own, as on another machine."""
        settings = stage.settings.model_copy(update={"home": stage.settings.home / self.name})
        settings.home.mkdir(exist_ok=True)
        inside = ["ip", "netns", "exec", self.name, sys.executable, "-m", "post_server.worker"]
        return stage.start(*inside, env=environment(settings))

    def close(self) -> None:
        ip("netns", "del", self.name)


@contextlib.contextmanager
def provider(folder: Path) -> Iterator[ServerHarness]:
    """The servers, and what the jobs need."""
    ip("link", "set", "lo", "up")
    ip("addr", "add", f"{SERVERS}/32", "dev", "lo")
    with contextlib.ExitStack() as stack:
        parts = Postgres(SERVERS), ObjectStore(SERVERS)
        for part in parts:
            stack.callback(part.close)
        os.environ.update(parts[1].environment)
        short = {"lease_seconds": 6.0, "heartbeat_seconds": 1.0, "reconcile_seconds": 0.5, "ring_seconds": 1.0}
        more = {"checkpoint_seconds": 1.0, "device": "cpu", "threads": 1}
        stage = ServerHarness(Settings(home=folder, **real_backing(*parts).urls, **short, **more))  # type: ignore[arg-type]
        stack.callback(stage.close)
        stage.add_target()
        stage.add_corpus()
        stage.start_redis()
        yield stage


def a_cut_off_worker(stage: ServerHarness, hosts: list[Host], folder: Path) -> None:
    """Loses its job to another host, stops by itself, changes nothing when it comes back, and works again."""
    job_id = stage.add_distil(steps=400)
    notifier.notify(job_id, stage.settings)
    first = hosts[0].start_worker(stage)
    stage.reaches(job_id, stage="distil", progress=0.15, seconds=_PATIENCE)
    hosts[0].cut()
    second = hosts[1].start_worker(stage)
    wait_for(lambda: stage.job(job_id).attempt == 2, _PATIENCE)
    wait_for(lambda: not job_processes(first), _PATIENCE)
    row = stage.ended(job_id, _PATIENCE)
    assert (row.state, row.attempt, row.error) == (JobState.SUCCEEDED, 2, None), stage.log()
    said = [event.data["state"] for event in stage.events(job_id) if event.kind == "state"]
    assert said in (
        ["queued", "running", "queued", "running", "succeeded"],
        ["queued", "running", "running", "succeeded"],
    )
    assert row.result is not None
    assert row.result["hash"] == undisturbed(stage, job_id, folder)
    seen = len(stage.events(job_id))
    second.terminate()
    assert second.wait(60) == 0
    later = stage.add_distil(steps=3, name="later")
    hosts[0].mend()
    notifier.notify(later, stage.settings)
    row = stage.ended(later, _PATIENCE)
    assert (row.state, row.attempt, row.error) == (JobState.SUCCEEDED, 1, None), stage.log()
    assert len(stage.events(job_id)) == seen
    assert first.poll() is None
    first.terminate()
    assert first.wait(60) == 0


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="post-") as name, contextlib.ExitStack() as stack:
        hosts = [Host(1), Host(2)]
        for host in hosts:
            stack.callback(host.close)
        stage = stack.enter_context(provider(Path(name)))
        (apart := Path(name) / "apart").mkdir()
        try:
            a_cut_off_worker(stage, hosts, apart)
        except BaseException:
            print(stage.log())
            raise


if __name__ == "__main__":
    main()
