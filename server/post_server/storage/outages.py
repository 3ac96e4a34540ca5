"""Whether an error says that a server which POST needs can't be reached: worth another try, and nobody's defect."""

from __future__ import annotations

from collections.abc import Iterator

_NETWORK_LIBRARIES = {"aiohttp", "botocore", "aiobotocore", "urllib3"}
_PASSING_REFUSALS = {408, 429}


def is_away(error: BaseException) -> bool:
    """Whether it could not be reached. One that answers and refuses (a wrong key, no such bucket) isn't away."""
    return any(_is_no_answer(each) for each in causes(error))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_no_answer(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    status = _status(error)
    refuses = status is not None and 400 <= status < 500 and status not in _PASSING_REFUSALS
    return type(error).__module__.split(".")[0] in _NETWORK_LIBRARIES and not refuses


def _status(error: BaseException) -> int | None:
    """The HTTP status of an answer that botocore tells of."""
    response = getattr(error, "response", None)
    found = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return found if isinstance(found, int) else None
