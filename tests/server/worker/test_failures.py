"""Which storage errors are outages, and which are refusals."""

from __future__ import annotations

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from post_server.storage.outages import is_unreachable


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
    assert is_unreachable(error) is away
    outer = OSError("raised by a library")
    outer.__cause__ = error
    assert is_unreachable(outer) is away
