"""One supervised process per job, the only one with torch: a cancel works and a crash ends that job alone."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from post_server.db.database import Database
from post_server.db.tables import JobRow
from post_server.jobs import notifier, queue, states
from post_server.jobs.states import Lease, LeaseLost
from post_server.maintenance.garbage_collection import ended_work
from post_server.processes import parent_death
from post_server.settings import Settings
from post_server.worker.exit_codes import PASSING
from post_shared.errors import JobKilled, JobStalled
from post_shared.schemas.jobs import JobState

log = logging.getLogger("post.worker")

_TICK = 0.1
_POLL_SECONDS = 1.0
"""How often the row is read, so that a cancel is noticed long before the next heartbeat."""


def work_folder(settings: Settings, job_id: str) -> Path:
    """Where a job keeps its checkpoint; it outlives the process and is removed when the job ends."""
    return settings.home / "work" / job_id


@dataclass
class _Attempt:
    """A running job process, and its supervisor's state."""

    lease: Lease
    attempt: int
    process: subprocess.Popen[bytes]
    kill_at: float | None = None
    lost: bool = False
    newest_event: int = 0
    progressed_at: float = field(default_factory=time.monotonic)
    stalled: bool = False
    asked_to_end: bool = False
    """We sent a signal, because the worker stops or the job is cancelled."""


class JobSupervisor:
    """Claims a job, watches its process, and writes the outcome if the process couldn't."""

    def __init__(self, settings: Settings, database: Database, stopping: threading.Event) -> None:
        self._settings, self._database, self._stopping = settings, database, stopping

    def run(self, job_id: str) -> None:
        """Run queued jobs in their order until none is left; ``job_id`` is only the one that was announced.

        A second delivery of the same id finds nothing to do.
        """
        while not self._stopping.is_set():
            with self._database.write() as session:
                claimed = queue.claim_next(session, self._settings)
            if claimed is None:
                log.debug("no job to claim", extra={"job": job_id})
                return
            self._run(*claimed)

    def _run(self, row: JobRow, lease: Lease) -> None:
        log.info("job started", extra={"job": row.id, "attempt": row.attempt})
        attempt = _Attempt(lease, row.attempt, self._start(lease))
        try:
            self._watch(attempt)
        finally:  # whatever happens here, no process is left behind
            _kill(attempt.process)
        self._settle(attempt)

    def sweep(self) -> None:
        """Remove the work folders of jobs that have ended; call it when the worker starts."""
        for path in ended_work(self._settings, self._database):
            shutil.rmtree(path, ignore_errors=True)

    # --- while it runs --------------------------------------------------------------------------------

    def _start(self, lease: Lease) -> subprocess.Popen[bytes]:
        settings = {f"POST_{name.upper()}": str(value) for name, value in self._settings.model_dump().items()}
        return subprocess.Popen(
            [sys.executable, "-m", "post_server.worker.job_process", lease.job_id, lease.token],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **settings, **parent_death.environment_for_child()},
            start_new_session=True,
        )

    def _watch(self, attempt: _Attempt) -> None:
        """Until the process has ended: renew the lease, pass on a cancel or a stop, kill it if it doesn't obey."""
        polled = renewed = time.monotonic()
        while attempt.process.poll() is None:
            now = time.monotonic()
            if now - renewed >= self._settings.heartbeat_seconds or now - polled >= _POLL_SECONDS:
                polled = now
                if self._poll_row(attempt, renew=now - renewed >= self._settings.heartbeat_seconds):
                    renewed = now
            if self._stopping.is_set():
                self._ask_to_end(attempt, self._settings.step_seconds)
            overdue = attempt.kill_at is not None and now > attempt.kill_at
            attempt.stalled = now - attempt.progressed_at > self._settings.progress_seconds
            silent = now - renewed > self._settings.lease_seconds  # another worker may have the job by now
            if overdue or silent or attempt.stalled or attempt.lost:
                _kill(attempt.process)
            time.sleep(_TICK)

    def _poll_row(self, attempt: _Attempt, *, renew: bool) -> bool:
        """Read the row, and renew the lease if ``renew``; returns whether it was renewed."""
        try:
            if renew:
                with self._database.write() as session:
                    seconds = self._settings.lease_seconds
                    state = states.heartbeat(session, attempt.lease, lease_seconds=seconds)
                    newest = states.last_event(session, attempt.lease.job_id)
            else:
                with self._database.read() as session:
                    state = states.held_state(session, attempt.lease)
                    newest = states.last_event(session, attempt.lease.job_id)
        except LeaseLost:
            # The process may have ended the job a moment ago; if it hasn't, it must not continue.
            with contextlib.suppress(subprocess.TimeoutExpired):
                attempt.process.wait(2.0)
            attempt.lost = True
            return False
        except OperationalError as error:
            log.warning("database away: %s", error.orig, extra={"job": attempt.lease.job_id})
            return False
        if newest > attempt.newest_event:
            attempt.newest_event, attempt.progressed_at = newest, time.monotonic()
        if state is JobState.CANCELLING:
            self._ask_to_end(attempt, self._settings.cancel_grace_seconds)
        return renew

    def _ask_to_end(self, attempt: _Attempt, grace: float) -> None:
        latest = time.monotonic() + grace
        if not attempt.asked_to_end:
            attempt.asked_to_end = True
            attempt.process.send_signal(signal.SIGTERM)
        attempt.kill_at = latest if attempt.kill_at is None else min(attempt.kill_at, latest)

    # --- afterwards -----------------------------------------------------------------------------------

    def _settle(self, attempt: _Attempt) -> None:
        """Write the outcome, unless the process did so or another worker has the job."""
        job_id, status = attempt.lease.job_id, attempt.process.wait()
        requeued = False
        try:
            with self._database.write() as session:
                requeued = self._write_end(session, attempt, status)
        except LeaseLost:
            pass
        except OperationalError as error:
            log.warning("database away: %s", error.orig, extra={"job": job_id})
            return  # the lease runs out and the reconciler takes over
        with self._database.read() as session:
            row = session.get(JobRow, job_id)
        if row is None or row.state.ended:
            shutil.rmtree(work_folder(self._settings, job_id), ignore_errors=True)
        state = row.state.value if row else "gone"
        log.info("job process ended", extra={"job": job_id, "state": state, "exit": status})
        if requeued and row is not None:
            notifier.notify(job_id, self._settings, row.device)

    def _write_end(self, session: Session, attempt: _Attempt, status: int) -> bool:
        """Write the state if the process wrote none; returns whether to announce the job again."""
        lease = attempt.lease
        state = states.held_state(session, lease)
        if state is JobState.CANCELLING:
            states.cancel(session, lease)
            return False
        if self._stopping.is_set():
            states.release(session, lease, reason="worker_stopped", give_attempt_back=True)
            return True
        if status in PASSING:  # the reconciler announces it a little later
            pause = self._settings.notify_seconds
            states.release(session, lease, reason=PASSING[status], give_attempt_back=True, pause_seconds=pause)
            return False
        seconds = self._settings.progress_seconds
        if attempt.attempt < self._settings.max_attempts:
            reason = f"no progress for {seconds:g} s" if attempt.stalled else f"process ended with {_how(status)}"
            states.release(session, lease, reason=reason)
            return True
        error = _stalled(seconds, attempt.attempt) if attempt.stalled else _killed(status, attempt.attempt)
        states.fail(session, lease, error)
        return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and everything that it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _how(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _times(attempts: int) -> str:
    return "once" if attempts == 1 else f"{attempts} times"


def _stalled(seconds: float, attempts: int) -> JobStalled:
    return JobStalled(
        f"it reported no progress for {seconds:g} s, {_times(attempts)}; see the worker's log, or set "
        "POST_PROGRESS_SECONDS higher if one step may take that long"
    )


def _killed(status: int, attempts: int) -> JobKilled:
    times = _times(attempts)
    if status == -signal.SIGKILL:
        return JobKilled(
            f"its process was killed {times}, which the system does when memory runs out; use a smaller model, "
            "batch or sequence length, or a machine with more memory",
            signal=signal.SIGKILL.value,
        )
    return JobKilled(f"its process ended {times} ({_how(status)}); see the worker's log", exit_status=status)
