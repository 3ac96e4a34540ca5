"""Notifies the workers that a job is queued. If the broker can't be reached, the reconciler does so later."""

from __future__ import annotations

import logging

from post_server.jobs.broker import RUN_JOB, celery_for, queue_of
from post_server.settings import Settings, get_settings

log = logging.getLogger("post.jobs")

_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}


def notify(job_id: str, settings: Settings | None = None, device: str | None = None) -> bool:
    """Announce a queued job to the workers with its device. Never raises: false if the broker can't be reached.

    Commit the row first: a worker may read it at once.
    """
    try:
        app = celery_for(settings or get_settings())
        options = {"queue": queue_of(device), "retry_policy": _RETRY}
        app.send_task(RUN_JOB, args=[job_id], retry=True, ignore_result=True, **options)
    except Exception as error:  # of any kind: the row is safe and the reconciler finds it
        log.warning("workers not notified: %s", type(error).__name__, extra={"job": job_id})
        return False
    return True


def waiting(settings: Settings, device: str | None = None) -> int | None:
    """How many notifications for a device class no worker has received yet; None if the broker can't be reached."""
    try:
        with celery_for(settings).connection_for_write() as connection:
            return int(connection.default_channel.client.llen(queue_of(device)))
    except Exception as error:
        log.debug("broker can't be reached: %s", type(error).__name__)
        return None
