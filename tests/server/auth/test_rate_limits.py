"""A key over its rate limit is told when to retry; other keys aren't affected, and without Redis nobody is refused."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import redis
from sqlalchemy import update

from post_client import Client
from post_server.auth.rate_limits import RateLimits
from post_server.db.tables import ApiKeyRow
from post_server.serve import embedded_redis
from post_shared.errors import TooManyRequests
from tests.server.http_harness import HttpHarness, code
from tests.server.server_harness import wait_for

LIMIT = 4


@pytest.fixture
def broker(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real Redis server on the socket in the home folder."""
    command = embedded_redis.command(embedded_redis.find_program(), home / "redis.sock")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with redis.Redis(unix_socket_path=str(home / "redis.sock")) as client:
        wait_for(lambda: _pings(client), 10.0, 0.01)
        yield process
    process.kill()
    process.wait()


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@pytest.fixture
def limited(home: Path, broker: subprocess.Popen[bytes]) -> Iterator[HttpHarness]:
    server = HttpHarness(home, requests_per_minute=LIMIT)
    yield server
    server.close()


def use_up(http_harness: HttpHarness, who: str) -> None:
    for _ in range(LIMIT):
        assert http_harness(who, "GET", "/v1/models").status_code == 200


def uncounted(http_harness: HttpHarness) -> float:
    match = re.search(
        r"^post_rate_limit_failures_total (\S+)$", http_harness(None, "GET", "/metrics").text, re.MULTILINE
    )
    assert match is not None
    return float(match[1])


def test_a_key_over_its_limit_is_told_when_to_retry(limited: HttpHarness) -> None:
    use_up(limited, "alice")
    answer = limited("alice", "GET", "/v1/models")
    assert code(answer) == (429, "too_many_requests")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.json()["retry_after"] == int(answer.headers["retry-after"])
    assert limited("bob", "GET", "/v1/models").status_code == 200
    assert limited(None, "GET", "/livez").status_code == 200
    assert uncounted(limited) == 0


def test_all_api_processes_share_the_count(limited: HttpHarness) -> None:
    use_up(limited, "alice")
    other = RateLimits(limited.settings, lambda: None)
    with pytest.raises(TooManyRequests):
        other.check(limited.key_ids["alice"])
    other.check(limited.key_ids["bob"])


@pytest.mark.parametrize(("own", "passes"), [(1, 1), (LIMIT + 3, LIMIT + 3), (0, LIMIT + 9)])
def test_a_keys_own_limit_overrides_the_servers(limited: HttpHarness, own: int, passes: int) -> None:
    with limited.database.write() as session:
        session.execute(update(ApiKeyRow).values(requests_per_minute=own))
    statuses = [limited("alice", "GET", "/v1/models").status_code for _ in range(passes + 1)]
    assert statuses == [200] * passes + [200 if own == 0 else 429]


def test_without_redis_requests_are_let_through_and_counted(
    limited: HttpHarness, broker: subprocess.Popen[bytes]
) -> None:
    use_up(limited, "alice")
    broker.kill()
    broker.wait()
    for _ in range(3):
        assert limited("alice", "GET", "/v1/models").status_code == 200
    assert uncounted(limited) == 3


def test_a_hanging_redis_blocks_nobody(limited: HttpHarness, broker: subprocess.Popen[bytes]) -> None:
    limited("alice", "GET", "/v1/models")
    broker.send_signal(signal.SIGSTOP)
    try:
        for _ in range(LIMIT + 1):
            assert limited("alice", "GET", "/v1/models").status_code == 200
    finally:
        broker.send_signal(signal.SIGCONT)
    assert uncounted(limited) == LIMIT + 1


def test_the_client_waits_for_retry_after(limited: HttpHarness, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_up(limited, "alice")
    waits: list[float] = []

    def sleep(seconds: float) -> None:  # reset the counts instead of waiting a minute
        waits.append(seconds)
        with redis.Redis(unix_socket_path=str(home / "redis.sock")) as broker:
            broker.flushall()

    monkeypatch.setattr("tenacity.nap.time.sleep", sleep)
    responses: list[httpx.Response] = []

    class RecordingTransport(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            responses.append(super().handle_request(request))
            return responses[-1]

    with Client(url=limited.url, api_key=limited.keys["alice"], transport=RecordingTransport()) as client:
        assert list(client.models.list()) == []
    assert [response.status_code for response in responses] == [429, 200]
    assert waits == [float(responses[0].headers["retry-after"])]
