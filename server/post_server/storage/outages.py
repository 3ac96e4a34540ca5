"""Tells outages of external services, which are worth a retry, from defects."""

from __future__ import annotations

from collections.abc import Iterator

_NETWORK_LIBRARIES = {"aiohttp", "botocore", "aiobotocore", "urllib3"}
_TRANSIENT_STATUSES = {408, 429}


def is_unreachable(error: BaseException) -> bool:
    """Whether a service couldn't be reached. One that refuses (wrong key, no such bucket) is reachable."""
    return any(_is_outage(cause) for cause in causes(error))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and its causes."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_outage(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    status = _status(error)
    refuses = status is not None and 400 <= status < 500 and status not in _TRANSIENT_STATUSES
    return type(error).__module__.split(".")[0] in _NETWORK_LIBRARIES and not refuses


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of botocore."""
    response = getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return status if isinstance(status, int) else None
