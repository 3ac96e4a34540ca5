"""The Celery broker. It only carries the ids of rows, so nothing is lost when it is emptied."""

from __future__ import annotations

import socket
from functools import lru_cache
from typing import Any

from celery import Celery

from post_server.settings import Settings

QUEUE = "post.jobs"
"""For jobs that any worker can run; each device class has a queue of its own, see :func:`queue_of`."""
RUN_JOB = "post.run_job"
_CONNECT_SECONDS = 1.0
_ANSWER_SECONDS = 2.0
"""How long a notification waits for a server that hangs."""


_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A waiting worker sends nothing, so only keepalives detect that the server behind a cut link is gone."""


def queue_of(device: str | None) -> str:
    """The queue that workers with that device class listen to; None: all workers."""
    return QUEUE if device is None else f"{QUEUE}.{device}"


@lru_cache(maxsize=8)
def celery_for(settings: Settings) -> Any:
    """The Celery application of the settings' Redis (``redis://…``, ``rediss://…``, ``unix://path``).

    Messages are acknowledged on arrival and no result is kept: the job row has the whole state.
    """
    app = Celery("post", set_as_current=False)
    app.conf.update(
        broker_url=_kombu_url(settings.redis_url),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_connect_timeout": _CONNECT_SECONDS,
            "socket_timeout": _ANSWER_SECONDS,
            "socket_keepalive": True,
            "socket_keepalive_options": {
                getattr(socket, name): value for name, value in _KEEPALIVE.items() if hasattr(socket, name)
            },
            "visibility_timeout": settings.visibility_seconds,
            "unacked_restore_interval": min(10.0, settings.visibility_seconds / 20),  # checked every tenth interval
            "max_retries": 1,
            "interval_start": 0,
            "interval_max": 0.2,
        },
        task_default_queue=QUEUE,
        task_ignore_result=True,
        task_acks_late=False,
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        enable_utc=True,
    )
    return app


def _kombu_url(redis_url: str) -> str:
    """Kombu writes a unix socket as ``redis+socket://``; the rest of the URL stays."""
    return redis_url.replace("unix://", "redis+socket://", 1) if redis_url.startswith("unix://") else redis_url
