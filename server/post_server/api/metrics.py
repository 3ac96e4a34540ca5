"""Counts for Prometheus: requests as they come, jobs as they are at the moment of asking."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from post_server.database import Database
from post_server.records import JobRow
from post_shared.schemas import JobKind, JobState

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_SECONDS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)


class Metrics:
    """One process's counts, in a registry of its own."""

    def __init__(self, database: Database) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route")
        self._requests = Counter(
            "post_http_requests", "Requests answered.", (*labels, "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "post_http_request_seconds", "Time to answer.", labels, buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(_Jobs(database))

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request. The labels take few values, whatever is asked for."""
        known = method if method in _METHODS else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(known, route).observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus's text form."""
        return generate_latest(self.registry)


class _Jobs(Collector):
    def __init__(self, database: Database) -> None:
        self._database = database

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering needs no database

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("post_jobs", "Jobs by kind and state.", labels=("kind", "state"))
        with self._database.read() as session:
            statement = select(JobRow.kind, JobRow.state, func.count()).group_by(JobRow.kind, JobRow.state)
            counts = {(kind, state): count for kind, state, count in session.execute(statement)}
        for kind in JobKind:
            for state in JobState:
                family.add_metric((kind.value, state.value), counts.get((kind, state), 0))
        yield family
