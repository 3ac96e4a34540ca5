"""Prometheus metrics: requests are counted as they come, jobs at the time of the scrape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from post_server.db.database import Database
from post_server.db.tables import JobEventRow, JobRow, now
from post_shared.schemas.jobs import JobKind, JobState

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_SECONDS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)


class Metrics:
    """The metrics of one process, in a registry of its own."""

    def __init__(self, database: Database) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route")
        self._requests = Counter(
            "post_http_requests", "Requests answered.", (*labels, "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "post_http_request_seconds", "Time to answer.", labels, buckets=_SECONDS, registry=self.registry
        )
        self._uncounted = Counter(
            "post_rate_limit_failures",
            "Requests let through uncounted: Redis was unreachable.",
            registry=self.registry,
        )
        self.registry.register(_Jobs(database))

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request. Its labels have few values, whatever the request."""
        label = method if method in _METHODS else "other"
        self._requests.labels(label, route, str(status)).inc()
        self._seconds.labels(label, route).observe(seconds)

    def uncounted(self) -> None:
        """Count a request without a rate limit, because Redis was unreachable."""
        self._uncounted.inc()

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _Jobs(Collector):
    def __init__(self, database: Database) -> None:
        self._database = database

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering needs no database

    def collect(self) -> Iterable[Metric]:
        with self._database.read() as session:
            yield _job_counts(session)
            yield _queue_ages(session)
            yield _step_times(session)
            losses = session.scalar(select(func.sum(JobRow.lease_losses))) or 0
        yield CounterMetricFamily("post_lease_losses", "Jobs taken from a worker without heartbeats.", value=losses)


def _job_counts(session: Session) -> Metric:
    family = GaugeMetricFamily("post_jobs", "Jobs by kind and state.", labels=("kind", "state"))
    statement = select(JobRow.kind, JobRow.state, func.count()).group_by(JobRow.kind, JobRow.state)
    counts = {(kind, state): count for kind, state, count in session.execute(statement)}
    for kind in JobKind:
        for state in JobState:
            family.add_metric((kind.value, state.value), counts.get((kind, state), 0))
    return family


def _queue_ages(session: Session) -> Metric:
    family = GaugeMetricFamily("post_queue_age_seconds", "How long the oldest queued job has waited.", labels=("kind",))
    statement = select(JobRow.kind, func.min(JobRow.queued_at)).where(JobRow.state == JobState.QUEUED)
    ages = dict.fromkeys(JobKind, 0.0)
    at = now()
    for kind, oldest in session.execute(statement.group_by(JobRow.kind)):
        ages[kind] = max(0.0, (at - oldest).total_seconds())
    for kind, age in ages.items():
        family.add_metric((kind.value,), age)
    return family


def _step_times(session: Session) -> Metric:
    """The mean of the running jobs' last reported step times."""
    family = GaugeMetricFamily("post_job_step_seconds", "Time of a step in running jobs.", labels=("kind", "stage"))
    running = select(JobRow.id, JobRow.kind).where(JobRow.state == JobState.RUNNING)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for job_id, kind in session.execute(running).all():
        newest = select(JobEventRow.data).where(JobEventRow.job_id == job_id, JobEventRow.kind == "progress")
        data = session.scalar(newest.order_by(JobEventRow.sequence.desc()).limit(1)) or {}
        if "step_seconds" in data:
            times[kind.value, str(data["stage"])].append(float(data["step_seconds"]))
    for labels, seconds in sorted(times.items()):
        family.add_metric(labels, sum(seconds) / len(seconds))
    return family
