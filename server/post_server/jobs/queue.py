"""Which job is next. The rows decide; a notification only wakes a worker, which takes the first job it can run.

First comes the higher priority, then the key with the fewest running jobs, then the older job. Jobs of a key that has
reached its limit of running jobs, and jobs that need another device, are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.orm import Session

from post_server.db.database import guard_claims
from post_server.db.tables import ApiKeyRow, JobRow, now
from post_server.jobs.states import HELD, Lease, claim, free
from post_server.settings import Settings
from post_shared.schemas.jobs import JobKind

GPU = "cuda"
_TRIES = 5


def startable(settings: Settings, devices: frozenset[str]) -> Select[str]:
    """Ids of the jobs that a worker with these device classes may start now, in their order."""
    running = (
        select(JobRow.owner_key_id, func.count().label("count"))
        .where(JobRow.state.in_(HELD), JobRow.lease_until >= now())
        .group_by(JobRow.owner_key_id)
        .subquery()
    )
    count = func.coalesce(running.c.count, 0)
    limit = func.coalesce(ApiKeyRow.running_jobs, settings.running_jobs_per_key)
    return (
        select(JobRow.id)
        .join(ApiKeyRow, ApiKeyRow.id == JobRow.owner_key_id)
        .outerjoin(running, running.c.owner_key_id == JobRow.owner_key_id)
        .where(free(settings.max_attempts), or_(limit == 0, count < limit), _fits(devices))
        .order_by(JobRow.priority.desc(), count, JobRow.created_at, JobRow.id)
    )


def claim_next(session: Session, settings: Settings) -> tuple[JobRow, Lease] | None:
    """Claim the next job for this machine; None if there is none.

    Claims are serialised, so that a key's limit holds however many workers claim at once.
    """
    guard_claims(session)
    for _ in range(_TRIES):  # only a cancel can come in between
        job_id = session.scalar(startable(settings, devices(settings)).limit(1))
        if job_id is None:
            return None
        claimed = claim(session, job_id, lease_seconds=settings.lease_seconds, max_attempts=settings.max_attempts)
        if claimed is not None:
            return claimed
    return None


def devices(settings: Settings) -> frozenset[str]:
    """The device classes of a worker with these settings, determined without torch."""
    if settings.device.startswith(GPU):
        return frozenset({GPU})
    if settings.device in {"auto", "spread"} and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(_gpus()):
        return frozenset({GPU})
    return frozenset()


def device_for(kind: JobKind, settings: Settings) -> str | None:
    """The device class that a new job needs; None: any worker will do."""
    return GPU if kind in settings.gpu_jobs.split(",") else None


def _fits(devices: frozenset[str]) -> ColumnElement[bool]:
    return or_(JobRow.device.is_(None), JobRow.device.in_(sorted(devices)))


def _gpus() -> list[Path]:
    return list(Path("/dev").glob("nvidia[0-9]*"))
