"""How many requests an API key may make in a minute, counted in Redis for all API processes together.

The counting guards the service, not a secret: when Redis can't be reached, requests go through and that is counted.
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

_ANSWER_SECONDS = 0.25
"""How long a request may wait for Redis."""
_PAUSE_SECONDS = 2.0
"""After a failure Redis is left alone for so long: a server that hangs must not slow every request down."""
_PREFIX = "post:limits"


class RateLimits:
    """A sliding window of a minute for each key. Safe to share between threads."""

    def __init__(self, settings: Settings, on_failure: Callable[[], None]) -> None:
        self._default = settings.requests_per_minute
        self._on_failure = on_failure
        self._again_at = 0.0
        waits = {"socket_timeout": _ANSWER_SECONDS, "socket_connect_timeout": _ANSWER_SECONDS}
        pool = ConnectionPool.from_url(settings.redis_url, **waits)
        self._window = SlidingWindowCounterRateLimiter(
            RedisStorage("redis://", connection_pool=pool, key_prefix=_PREFIX)
        )

    def check(self, key_id: str, per_minute: int | None = None) -> None:
        """Count a request. ``per_minute`` is the key's own limit, the server's when it has none; 0 is no limit.

        Raises:
            TooManyRequests: it is one too many; ``retry_after`` says when the next one will do.
        """
        limit = self._default if per_minute is None else per_minute
        if limit == 0:
            return
        item = RateLimitItemPerMinute(limit)
        if time.monotonic() < self._again_at:
            self._on_failure()
            return
        try:
            if self._window.hit(item, key_id):
                return
            seconds = self._window.get_window_stats(item, key_id).reset_time - time.time()
        except (RedisError, OSError) as error:
            self._again_at = time.monotonic() + _PAUSE_SECONDS
            self._on_failure()
            log.warning("requests are not counted", error=type(error).__name__)
            return
        raise TooManyRequests(
            f"This key may make {limit} requests a minute; wait, or ask the provider for more (post key limit).",
            retry_after=max(1, math.ceil(seconds)),
        )
