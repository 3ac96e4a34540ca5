"""The process of one job: ``python -m post_server.worker.job_process JOB_ID TOKEN``. It imports torch.

It writes how the job ended, if it still holds the lease. Otherwise the supervisor decides by its exit status.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.exc import OperationalError

from post_server.db.database import Database
from post_server.db.tables import JobRow
from post_server.jobs import states
from post_server.jobs.states import Lease, LeaseLost
from post_server.logs import configure_logs
from post_server.processes import parent_death
from post_server.processes.library_logging import quiet_models
from post_server.settings import Settings, get_settings
from post_server.storage.blob_store import BlobStore
from post_server.storage.outages import is_unreachable
from post_server.worker.exit_codes import DATABASE_AWAY, ENDED, INTERRUPTED, LOST, STORAGE_AWAY
from post_server.worker.failures import known_failure
from post_server.worker.progress import ProgressWriter
from post_server.worker.supervisor import work_folder
from post_shared.errors import Cancelled, PostError

if TYPE_CHECKING:
    from post_server.jobs.context import Outcome

log = logging.getLogger("post.job")


class JobProcess:
    """Runs one job under one lease."""

    def __init__(self, settings: Settings, lease: Lease, interrupted: threading.Event) -> None:
        self._settings, self._lease, self._interrupted = settings, lease, interrupted
        self._database = Database.from_settings(settings)
        self._store = BlobStore.from_settings(settings)
        self._folder = work_folder(settings, lease.job_id)

    def run(self) -> int:
        """Run the job; returns the exit status."""
        try:
            with self._exclusive():
                return self._run()
        except LeaseLost:
            log.warning("another worker holds the job now", extra={"job": self._lease.job_id})
            return LOST
        except Cancelled:
            return INTERRUPTED
        except OperationalError as error:
            log.error("database away: %s", error.orig, extra={"job": self._lease.job_id})
            return DATABASE_AWAY
        finally:
            self._database.dispose()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Wait for an earlier process of this job on this machine to end: it may still write its checkpoint."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._folder / "lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._stop_if_interrupted()
                    time.sleep(0.1)
            yield

    def _run(self) -> int:
        with self._database.read() as session:
            states.held_state(session, self._lease)
            row = session.get_one(JobRow, self._lease.job_id)
        try:
            outcome = self._handle(row)
            with self._database.write() as session:  # the new rows and the success: both or neither
                result = outcome(session)  # it stores blobs before its first statement
                states.finish(session, self._lease, result)
        except (Cancelled, LeaseLost, OperationalError):
            raise
        except Exception as error:
            if is_unreachable(error):
                log.warning("store away: %r", error, extra={"job": row.id})
                return STORAGE_AWAY
            failure = known_failure(error)
            if failure is None:
                log.exception("job failed", extra={"job": row.id})
            return self._fail(failure or PostError("the job failed unexpectedly; see the worker's log", job=row.id))
        return ENDED

    def _handle(self, row: JobRow) -> Outcome:
        import torch  # slow, so only once the lease is known to hold

        from post_server.jobs.context import JobContext
        from post_server.worker.handlers import HANDLERS

        quiet_models()
        if self._settings.threads:
            torch.set_num_threads(self._settings.threads)
        scratch = self._folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)  # of an earlier attempt
        scratch.mkdir(parents=True)
        on_progress = ProgressWriter(self._database, self._lease, self._stop_if_interrupted)
        context = JobContext(
            row, self._database, self._store, self._settings, on_progress, self._folder / "checkpoint", scratch
        )
        return HANDLERS[row.kind](context)

    def _fail(self, error: PostError) -> int:
        log.info("job failed: %s", error.code, extra={"job": self._lease.job_id})
        with self._database.write() as session:
            states.fail(session, self._lease, error)
        return ENDED

    def _stop_if_interrupted(self) -> None:
        if self._interrupted.is_set():
            raise Cancelled("the job was interrupted")


def main(job_id: str, token: str) -> int:
    """Run the job; on SIGTERM, or when the worker dies, it saves a checkpoint and stops at its next step."""
    interrupted = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: interrupted.set())
    settings = get_settings()
    # The grace is shorter than what remains of the lease when the worker has just died.
    remaining = settings.lease_seconds - settings.heartbeat_seconds
    parent_death.die_with_parent(max(0.2, min(settings.stop_seconds, remaining / 2)))
    _lower_priority(settings.job_nice)
    configure_logs(settings)
    structlog.contextvars.bind_contextvars(job=job_id)  # for the log lines of libraries, too
    return JobProcess(settings, Lease(job_id, token), interrupted).run()


def _lower_priority(nice: int) -> None:
    """Give the API and predictor precedence. Linux may weigh whole sessions, and this process has its own."""
    os.nice(nice)
    with contextlib.suppress(OSError):  # not every system has it
        Path("/proc/self/autogroup").write_text(str(nice), encoding="ascii")


if __name__ == "__main__":
    status = main(*sys.argv[1:3])
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # everything is written; tearing torch down would delay the next job by a second
