"""The worker: takes queued jobs and runs each in a process of its own. See :func:`main`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that what needs one small part of this package gets no more
    from post_server.settings import Settings


def main(settings: Settings) -> int:
    """Work until a signal comes; the exit status."""
    from post_server.worker.celery_app import main as work

    return work(settings)
