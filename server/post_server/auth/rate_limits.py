"""Requests per minute of an API key, counted in Redis for all API processes together.

The limit protects the service, not a secret: if Redis can't be reached, requests are let through, and counted as such.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import structlog
from limits import RateLimitItemPerMinute
from limits.storage import RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis import ConnectionPool
from redis.exceptions import RedisError

from post_server.settings import Settings
from post_shared.errors import TooManyRequests

log = structlog.get_logger("post.api")

_TIMEOUT_SECONDS = 0.25
"""How long a request waits for Redis."""
_PAUSE_SECONDS = 2.0
"""Redis isn't tried for this long after a failure, so that a hanging server doesn't slow down every request."""
_PREFIX = "post:limits"


class RateLimits:
    """A sliding window of one minute per key. Thread-safe."""

    def __init__(self, settings: Settings, on_failure: Callable[[], None]) -> None:
        self._default = settings.requests_per_minute
        self._on_failure = on_failure
        self._retry_at = 0.0
        timeouts = {"socket_timeout": _TIMEOUT_SECONDS, "socket_connect_timeout": _TIMEOUT_SECONDS}
        pool = ConnectionPool.from_url(settings.redis_url, **timeouts)
        self._window = SlidingWindowCounterRateLimiter(
            RedisStorage("redis://", connection_pool=pool, key_prefix=_PREFIX)
        )

    def check(self, key_id: str, per_minute: int | None = None) -> None:
        """Count a request. ``per_minute`` is the key's own limit; None means the server's, 0 no limit.

        Raises:
            TooManyRequests: the limit is exceeded; ``retry_after`` is in seconds.
        """
        limit = self._default if per_minute is None else per_minute
        if limit == 0:
            return
        item = RateLimitItemPerMinute(limit)
        if time.monotonic() < self._retry_at:
            self._on_failure()
            return
        try:
            if self._window.hit(item, key_id):
                return
            seconds = self._window.get_window_stats(item, key_id).reset_time - time.time()
        except (RedisError, OSError) as error:
            self._retry_at = time.monotonic() + _PAUSE_SECONDS
            self._on_failure()
            log.warning("requests are not counted", error=type(error).__name__)
            return
        raise TooManyRequests(
            f"This key may make {limit} requests per minute; wait, or ask the provider for more (post key limit).",
            retry_after=max(1, math.ceil(seconds)),
        )
