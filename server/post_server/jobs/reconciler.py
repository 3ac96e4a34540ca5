"""Finds lost jobs: those of silent workers, and those that no worker was notified of."""

from __future__ import annotations

import logging
import threading

from post_server.db.database import Database
from post_server.db.tables import JobRow
from post_server.jobs import notifier, queue, states
from post_server.settings import Settings
from post_shared.schemas.jobs import JobState

log = logging.getLogger("post.jobs")


def reconcile(database: Database, settings: Settings) -> list[str]:
    """One round; returns the ids of the jobs that were announced again. Concurrent rounds do no harm.

    Undelivered jobs are announced only while no notification waits in the broker: busy workers will handle the
    waiting ones, and so the queue can't grow. Jobs that no worker may start yet (their key's limit) are left out.
    """
    with database.read() as session:
        lost = [(row.id, row.token, row.device) for row in states.expired(session)]
    to_announce: dict[str, str | None] = {}
    for job_id, token, device in lost:
        with database.write() as session:
            state = states.take_back(session, job_id, token, max_attempts=settings.max_attempts)
        if state is not None:
            log.warning("worker lost", extra={"job": job_id, "state": state.value})
        if state is JobState.QUEUED:
            to_announce[job_id] = device
    for device in (None, queue.GPU):
        statement = queue.startable(settings, frozenset({queue.GPU})).where(JobRow.device == device)
        with database.read() as session:
            overdue = list(session.scalars(statement.where(states.overdue(settings.notify_seconds))))
        if overdue and notifier.waiting(settings, device) == 0:
            to_announce |= dict.fromkeys(overdue, device)
    return [job_id for job_id, device in to_announce.items() if notifier.notify(job_id, settings, device)]


class Reconciler(threading.Thread):
    """Reconciles immediately and then every few seconds, until :meth:`stop`."""

    def __init__(self, database: Database, settings: Settings) -> None:
        super().__init__(name="reconciler", daemon=True)
        self._database, self._settings = database, settings
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                reconcile(self._database, self._settings)
            except Exception:  # the database may be away for a while; the next round tries again
                log.exception("reconciling failed")
            self._stopping.wait(self._settings.reconcile_seconds)

    def stop(self) -> None:
        """End after the current round."""
        self._stopping.set()
        if self.is_alive():
            self.join(5.0)
