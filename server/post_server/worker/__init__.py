"""The worker: takes queued jobs and runs each one in its own process. See :func:`main`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that importing one small part of this package imports nothing else
    from post_server.settings import Settings


def main(settings: Settings) -> int:
    """Run jobs until a signal arrives; returns the exit status."""
    from post_server.worker.celery_app import main as run_worker

    return run_worker(settings)
