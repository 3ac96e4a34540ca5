"""The Celery worker: hears the doorbell, hands the id to the supervisor, and nothing else."""

from __future__ import annotations

import logging
import threading
import warnings
from typing import Any

from celery import signals
from celery.platforms import SecurityWarning

from post_server.db.database import Database
from post_server.jobs.broker import RUN_JOB, celery_for, queue_of
from post_server.jobs.queue import devices
from post_server.jobs.reconciler import Reconciler
from post_server.logs import configure_logs
from post_server.settings import Settings
from post_server.storage.blob_store import BlobStore
from post_server.worker.supervisor import JobSupervisor

log = logging.getLogger("post.worker")


def _log_celery_our_way(**_: Any) -> None:
    """Connected, so Celery sets up no logging of its own."""
    logger = logging.getLogger("celery")
    logger.handlers[:] = logging.getLogger("post").handlers
    logger.propagate = False
    logger.setLevel(logging.WARNING)  # what it says about each message, the supervisor says about each job


def main(settings: Settings) -> int:
    """Work until SIGTERM or SIGINT: then running jobs keep a checkpoint and go back into the queue."""
    configure_logs(settings)
    signals.setup_logging.connect(_log_celery_our_way, weak=False)
    warnings.simplefilter("ignore", SecurityWarning)  # about pickle and root; messages here are JSON with one id
    database, stopping = Database.from_settings(settings), threading.Event()
    supervisor = JobSupervisor(settings, database, stopping)
    supervisor.sweep()
    BlobStore.from_settings(settings).sweep()
    app = celery_for(settings)
    app.task(supervisor.run, name=RUN_JOB, ignore_result=True, typing=False)

    def note_stop(**_: Any) -> None:
        stopping.set()

    signals.worker_shutting_down.connect(note_stop)
    reconciler = Reconciler(database, settings)
    reconciler.start()
    worker = app.Worker(
        pool="threads",  # a thread only waits for the job's process
        concurrency=settings.worker_jobs,
        queues=[queue_of(device) for device in (None, *sorted(devices(settings)))],
        loglevel=settings.log_level,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    try:
        worker.start()
    finally:
        stopping.set()
        reconciler.stop()
        database.dispose()
    return int(worker.exitcode or 0)
