"""A provider whose processes can be killed, paused or starved one by one, and are restarted afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from tests.server.server_harness import ServerHarness, job_processes, wait_for

from post_client.client import Client
from post_server.auth.keys import create_key
from post_server.jobs import notifier
from post_server.settings import Settings
from post_shared.schemas.common import Role

LEASE_SECONDS = 4.0
PROGRESS_SECONDS = 60.0
"""Longer than loading the libraries takes on a busy machine; each hung job delays its run by this time."""
WORK_MEBIBYTES = 24
_OUTAGE_SECONDS = (0.1, 3.0)
_START_SECONDS = 300.0


class ChaosStage(ServerHarness):
    """Redis, an API and two workers with one home folder, and if possible a small file system for the work folder."""

    def __init__(self, home: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = int(listener.getsockname()[1])
        super().__init__(_settings(home, port))
        self.small_disk = self._mount()
        with self.database.write() as session:
            key = create_key(session, name="chaos", role=Role.PROVIDER)[1]
        self.client = Client(url=f"http://127.0.0.1:{port}", api_key=key, attempts=30)
        self.redis = self.start_redis()
        self.api = self._start_api()
        self.workers = [self.start_worker() for _ in range(2)]
        wait_for(self._is_ready, _START_SECONDS)

    def close(self) -> None:
        self.client.close()
        super().close()
        if self.small_disk:
            subprocess.run(["umount", "--lazy", self.work], check=True)

    @property
    def work(self) -> Path:
        return self.settings.home / "work"

    def busy_worker(self) -> int:
        """The index of the worker with a job process, or 0."""
        workers = enumerate(self.workers)
        return next((index for index, worker in workers if worker.poll() is None and job_processes(worker)), 0)

    def job_process(self) -> psutil.Process | None:
        """The current job process, if there is one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return next(iter(job_processes(self.workers[self.busy_worker()])), None)
        return None

    def restart_worker(self, number: int) -> None:
        self.workers[number].wait()
        self.workers[number] = self.start_worker()

    def restart_api(self) -> None:
        self.api.wait()
        self.api = self._start_api()

    def restart_redis(self) -> None:
        self.redis.wait()
        self.redis = self.start_redis()

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Fill the file system of the work folder."""
        filler = self.work / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while stream.write(bytes(4096)):
                pass
        try:
            yield
        finally:
            filler.unlink(missing_ok=True)

    def _start_api(self) -> subprocess.Popen[bytes]:
        app, port = "post_server.api.app:create_app", str(self.settings.port)
        return self.start(sys.executable, "-m", "uvicorn", app, "--factory", "--port", port, "--log-level", "warning")

    def _is_ready(self) -> bool:
        try:
            return self.client.ready().status == "ok"
        except Exception:
            return False

    def _mount(self) -> bool:
        self.work.mkdir(exist_ok=True)
        size = f"size={WORK_MEBIBYTES}m"
        return not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "none", self.work], capture_output=True
        ).returncode


def _settings(home: Path, port: int) -> Settings:
    """Short leases and pauses, and enough attempts that only a defect can lose a job."""
    return Settings(
        home=home,
        port=port,
        lease_seconds=LEASE_SECONDS,
        heartbeat_seconds=0.5,
        reconcile_seconds=0.5,
        notify_seconds=1.0,
        checkpoint_seconds=0.2,
        progress_seconds=PROGRESS_SECONDS,
        max_attempts=20,
        visibility_seconds=3.0,
        requests_per_minute=100_000,
        device="cpu",
        threads=1,
    )


# --- faults: each affects processes and restores them afterwards ---------------------------------------


def kill_worker(stage: ChaosStage, job_id: str, dice: random.Random) -> None:
    number = stage.busy_worker()
    stage.workers[number].kill()
    stage.restart_worker(number)


def kill_job(stage: ChaosStage, job_id: str, dice: random.Random) -> None:
    if (process := stage.job_process()) is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            os.killpg(process.pid, signal.SIGKILL)


def kill_redis(stage: ChaosStage, job_id: str, dice: random.Random) -> None:
    stage.redis.kill()
    time.sleep(dice.uniform(*_OUTAGE_SECONDS))
    stage.restart_redis()


def restart_redis(stage: ChaosStage, job_id: str, dice: random.Random) -> None:
    stage.redis.terminate()
    stage.restart_redis()


def kill_api(stage: ChaosStage, job_id: str, dice: random.Random) -> None:
    stage.api.kill()
    stage.restart_api()


def pause_worker(stage: ChaosStage, job_id: str, dice: random.Random) -> None:
    """Pause a worker beyond its lease: another worker may have claimed the job when it wakes up."""
    worker = stage.workers[stage.busy_worker()]
    worker.send_signal(signal.SIGSTOP)
    time.sleep(LEASE_SECONDS + dice.uniform(0.5, 3.0))
    worker.send_signal(signal.SIGCONT)


def hang_job(stage: ChaosStage, job_id: str, dice: random.Random) -> None:
    """Stop the job's process for good; its worker renews the lease until it notices."""
    if (process := stage.job_process()) is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)


def deliver_again(stage: ChaosStage, job_id: str, dice: random.Random) -> None:
    for _ in range(5):
        notifier.notify(job_id, stage.settings)


def fill_disk(stage: ChaosStage, job_id: str, dice: random.Random) -> None:
    with stage.full_disk():
        time.sleep(dice.uniform(*_OUTAGE_SECONDS))


def cut_power(stage: ChaosStage, job_id: str, dice: random.Random) -> None:
    """Kill all processes at the same time."""
    for process in (*stage.workers, stage.api, stage.redis):
        process.kill()
    stage.restart_redis()
    stage.restart_api()
    for number in range(len(stage.workers)):
        stage.restart_worker(number)


Fault = Callable[[ChaosStage, str, random.Random], None]
FAULTS: dict[str, Fault] = {
    "kill worker": kill_worker,
    "kill job": kill_job,
    "kill Redis": kill_redis,
    "restart Redis": restart_redis,
    "kill API": kill_api,
    "pause worker": pause_worker,
    "hang job": hang_job,
    "deliver again": deliver_again,
    "fill disk": fill_disk,
    "cut power": cut_power,
}
