"""The Celery worker: receives notifications and hands the job id to the supervisor, nothing else."""

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


def _configure_celery_logging(**_: Any) -> None:
    """Because it is connected to the signal, Celery doesn't set up its own logging."""
    logger = logging.getLogger("celery")
    logger.handlers[:] = logging.getLogger("post").handlers
    logger.propagate = False
    logger.setLevel(logging.WARNING)  # it logs every message; the supervisor already logs every job


def main(settings: Settings) -> int:
    """Run jobs until SIGTERM or SIGINT: then running jobs save a checkpoint and return to the queue."""
    configure_logs(settings)
    signals.setup_logging.connect(_configure_celery_logging, weak=False)
    warnings.simplefilter("ignore", SecurityWarning)  # about pickle and root; messages here are JSON with a single id
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
