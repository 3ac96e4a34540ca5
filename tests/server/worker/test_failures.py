"""What an error of a store means: it is away, or it refuses."""

from __future__ import annotations

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from post_server.storage.outages import is_away


def refusal(status: int) -> ClientError:
    return ClientError({"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (ConnectionResetError("cut"), True),
        (TimeoutError(), True),
        (EndpointConnectionError(endpoint_url="x"), True),
        (refusal(503), True),
        (refusal(429), True),
        (refusal(403), False),
        (refusal(404), False),
        (PermissionError("no"), False),
        (ValueError("no"), False),
    ],
)
def test_a_server_that_refuses_is_not_away(error: Exception, away: bool) -> None:
    assert is_away(error) is away
    outer = OSError("said by a library")
    outer.__cause__ = error
    assert is_away(outer) is away
