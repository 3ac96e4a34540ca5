"""Child processes that are restarted when they die, until they die too often."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from post_server.processes import parent_death
from post_shared.errors import Unavailable

_MIN_PAUSE = 0.5
_MAX_PAUSE = 10.0
_HEALTHY_SECONDS = 60.0
"""After a child has run for this long, earlier deaths don't count."""
_MAX_DEATHS = 5
_LOG_BYTES = 10 * 2**20


@dataclass
class Child:
    """One program, its log file, and how often it died recently."""

    name: str
    argv: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    inherited: Sequence[int] = ()
    """File descriptors that the child shares."""
    process: subprocess.Popen[bytes] | None = None
    deaths: int = 0
    started: float = 0.0
    restart_at: float = 0.0

    def start(self) -> None:
        """Start it in a session of its own, so that Ctrl-C reaches only us and we stop the children in order."""
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.log.exists() and self.log.stat().st_size > _LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with open(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment, **parent_death.environment_for_child()},
                pass_fds=self.inherited,
                start_new_session=True,
            )
        self.started = time.monotonic()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def tend(self) -> str | None:
        """Restart the child if it died and its pause is over; returns a message if it died.

        Raises:
            Unavailable: it died too often in a row.
        """
        if self.alive:
            return None
        if self.process is not None:
            return self._note_death(self.process.returncode)
        if time.monotonic() >= self.restart_at:
            self.start()
        return None

    def _note_death(self, status: int) -> str:
        lived = time.monotonic() - self.started
        self.deaths = 1 if lived >= _HEALTHY_SECONDS else self.deaths + 1
        if self.deaths > _MAX_DEATHS:
            raise Unavailable(
                f"the {self.name} ended {self.deaths} times ({_how(status)}); see {self.log}{_last_line(self.log)}"
            )
        pause = min(_MIN_PAUSE * 2 ** (self.deaths - 1), _MAX_PAUSE)
        self.process, self.restart_at = None, time.monotonic() + pause
        return f"the {self.name} ended ({_how(status)}); restarting it in {pause:g} s"

    def signal(self, number: int) -> None:
        """Send a signal to the child; SIGKILL goes to its whole process group."""
        if not self.alive or self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)


def stop(children: Sequence[Child], seconds: float) -> list[str]:
    """Terminate all, wait, and kill those that don't end; returns the names of the killed ones."""
    for child in children:
        child.signal(signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while any(child.alive for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed = [child.name for child in children if child.alive]
    for child in children:
        child.signal(signal.SIGKILL)
        if child.process is not None:
            child.process.wait()
    return killed


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def _last_line(log: Path) -> str:
    try:
        lines = log.read_bytes()[-4000:].decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return f". Its last line: {lines[-1].strip()[:500]}" if lines else ""


class Stopping:
    """How many stop signals have arrived: none, one (stop), or more (stop now)."""

    count = 0

    def __bool__(self) -> bool:
        return self.count > 0
