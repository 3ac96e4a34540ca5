"""``unshare --net python -m tests.server.worker.several_hosts``: a provider with each worker on its own host.

The servers (PostgreSQL, Redis, S3) run in the network namespace of this process. Each worker runs in its own network
namespace, at the other end of a virtual cable that can be cut. Nothing reaches another network.
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
from tests.server.server_harness import ServerHarness, environment, job_processes, undisturbed_hash, wait_for

SERVERS = "10.77.0.1"
_MAX_SECONDS = 180.0


def ip(*words: object) -> None:
    """Run one iproute2 command."""
    subprocess.run(["ip", *map(str, words)], check=True)


class Host:
    """A network namespace with one virtual cable to the servers."""

    def __init__(self, number: int) -> None:
        self.name, self.cable = f"post-{os.getpid()}-{number}", f"post{number}"
        server_end, host_end = f"10.77.{number}.1", f"10.77.{number}.2"
        ip("netns", "add", self.name)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("addr", "add", f"{server_end}/24", "dev", self.cable)
        ip("-n", self.name, "addr", "add", f"{host_end}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self.name, "link", "set", device, "up")
        ip("-n", self.name, "route", "add", SERVERS, "via", server_end)
        self.reconnect()

    def cut(self) -> None:
        """Cut the cable: packets are dropped silently."""
        ip("link", "set", self.cable, "down")

    def reconnect(self) -> None:
        """Restore the cable."""
        ip("link", "set", self.cable, "up")

    def start_worker(self, harness: ServerHarness) -> subprocess.Popen[bytes]:
        """A worker with its own home folder, as on another machine."""
        settings = harness.settings.model_copy(update={"home": harness.settings.home / self.name})
        settings.home.mkdir(exist_ok=True)
        inside = ["ip", "netns", "exec", self.name, sys.executable, "-m", "post_server.worker"]
        return harness.start(*inside, env=environment(settings))

    def close(self) -> None:
        ip("netns", "del", self.name)


@contextlib.contextmanager
def provider(folder: Path) -> Iterator[ServerHarness]:
    """The servers, and the rows that the jobs need."""
    ip("link", "set", "lo", "up")
    ip("addr", "add", f"{SERVERS}/32", "dev", "lo")
    with contextlib.ExitStack() as stack:
        postgres, object_store = Postgres(SERVERS), ObjectStore(SERVERS)
        for service in (postgres, object_store):
            stack.callback(service.close)
        os.environ.update(object_store.environment)
        short = {"lease_seconds": 6.0, "heartbeat_seconds": 1.0, "reconcile_seconds": 0.5, "notify_seconds": 1.0}
        more = {"checkpoint_seconds": 1.0, "device": "cpu", "threads": 1}
        harness = ServerHarness(Settings(home=folder, **real_backing(postgres, object_store).urls, **short, **more))  # type: ignore[arg-type]
        stack.callback(harness.close)
        harness.add_target()
        harness.add_corpus()
        harness.start_redis()
        yield harness


def check_disconnected_worker(harness: ServerHarness, hosts: list[Host], folder: Path) -> None:
    """It loses its job to another host, stops by itself, changes nothing once reconnected, and works again."""
    job_id = harness.add_distil(steps=400)
    notifier.notify(job_id, harness.settings)
    first = hosts[0].start_worker(harness)
    harness.reaches(job_id, stage="distil", progress=0.15, seconds=_MAX_SECONDS)
    hosts[0].cut()
    second = hosts[1].start_worker(harness)
    wait_for(lambda: harness.job(job_id).attempt == 2, _MAX_SECONDS)
    wait_for(lambda: not job_processes(first), _MAX_SECONDS)
    row = harness.ended(job_id, _MAX_SECONDS)
    assert (row.state, row.attempt, row.error) == (JobState.SUCCEEDED, 2, None), harness.log()
    job_states = [event.data["state"] for event in harness.events(job_id) if event.kind == "state"]
    assert job_states in (
        ["queued", "running", "queued", "running", "succeeded"],
        ["queued", "running", "running", "succeeded"],
    )
    assert row.result is not None
    assert row.result["hash"] == undisturbed_hash(harness, job_id, folder)
    event_count = len(harness.events(job_id))
    second.terminate()
    assert second.wait(60) == 0
    later = harness.add_distil(steps=3, name="later")
    hosts[0].reconnect()
    notifier.notify(later, harness.settings)
    row = harness.ended(later, _MAX_SECONDS)
    assert (row.state, row.attempt, row.error) == (JobState.SUCCEEDED, 1, None), harness.log()
    assert len(harness.events(job_id)) == event_count
    assert first.poll() is None
    first.terminate()
    assert first.wait(60) == 0


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="post-") as name, contextlib.ExitStack() as stack:
        hosts = [Host(1), Host(2)]
        for host in hosts:
            stack.callback(host.close)
        harness = stack.enter_context(provider(Path(name)))
        (folder := Path(name) / "apart").mkdir()
        try:
            check_disconnected_worker(harness, hosts, folder)
        except BaseException:
            print(harness.log())
            raise


if __name__ == "__main__":
    main()
