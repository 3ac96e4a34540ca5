"""``post serve``: starts everything, keeps it running, leaves nothing behind, and reports errors in one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import redis

from post_server.serve import embedded_redis, main
from post_server.serve.children import Child
from post_server.settings import Settings
from post_shared.errors import Unavailable
from tests.server.server_harness import environment, processes_in, wait_for

STOP_SECONDS = 6.0


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running server and its URL; remaining processes are killed afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "post_server.serve"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(settings),
    )
    try:
        ready = settings.home / "serve.json"
        wait_for(lambda: ready.exists() or process.poll() is not None, 90.0)
        assert process.poll() is None, process.communicate()
        server = json.loads(ready.read_text())
        assert server["pid"] == process.pid
        yield process, server["url"]
    finally:
        for each in [process, *processes_in(settings.home)]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                each.kill()
        process.communicate()


def settings_for(home: Path, **more: object) -> Settings:
    fast = {"port": 0, "stop_seconds": STOP_SECONDS, "reconcile_seconds": 0.5, "device": "cpu", "threads": 1}
    return Settings.model_validate({"home": home, **fast, **more})


def part(settings: Settings, name: str) -> psutil.Process | None:
    for process in processes_in(settings.home):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if command[1:4] == ["-m", "post_server.serve.child", name]:
                return process
    return None


def test_it_starts_restarts_its_parts_and_stops_without_a_trace(home: Path) -> None:
    settings = settings_for(home / "new")
    with serving(settings) as (process, url):
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        assert stat.S_IMODE(settings.home.stat().st_mode) == 0o700
        assert stat.S_IMODE((settings.home / "redis.sock").stat().st_mode) == 0o700
        assert stat.S_IMODE((settings.home / "post.db").stat().st_mode) == 0o600
        listening = [c for p in processes_in(settings.home) for c in p.net_connections() if c.status == "LISTEN"]
        assert {c.laddr.port for c in listening} == {httpx.URL(url).port}, "one TCP port, the API's"
        assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
        for name in ("api", "worker", "predictor"):
            wait_for(lambda name=name: part(settings, name), 10.0)  # type: ignore[misc]
        messages: list[str] = []
        assert main(settings, messages.append) == 1
        assert len(messages) == 1
        assert f"process {process.pid}" in messages[0]
        _check_restarts(settings, url)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=STOP_SECONDS + 5)
        assert time.monotonic() - began < STOP_SECONDS + 3
        assert process.returncode == 0, errors
        assert output.strip() == url
        assert "had to kill" not in errors
        assert processes_in(settings.home) == []
        assert not (settings.home / "serve.json").exists()


def _check_restarts(settings: Settings, url: str) -> None:
    """Kill each part once; the API's port stays open, so a request waits instead of being refused."""
    for name in ("worker", "api"):
        old = part(settings, name)
        assert old is not None
        old.kill()
        wait_for(lambda name=name, old=old: (new := part(settings, name)) and new.pid != old.pid, 10.0)  # type: ignore[misc]
    assert httpx.get(f"{url}/readyz", timeout=20.0, trust_env=False).status_code == 200
    (server,) = [each for each in processes_in(settings.home) if "unixsocket" in " ".join(each.cmdline())]
    server.kill()
    with redis.Redis.from_url(settings.redis_url) as client:
        wait_for(lambda: _pings(client), 10.0)


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def test_the_api_answers_once_the_database_is_migrated(home: Path) -> None:
    settings = settings_for(home)
    (gate, opener), listening = os.pipe(), socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/livez"
    command = [sys.executable, "-m", "post_server.serve.child", "api", str(listening.fileno()), str(gate)]
    with (
        listening,
        subprocess.Popen(command, pass_fds=[listening.fileno(), gate], env=environment(settings)) as process,
    ):
        try:
            with pytest.raises(httpx.ReadTimeout):
                httpx.get(url, timeout=10.0, trust_env=False)
            os.close(opener)
            assert httpx.get(url, timeout=30.0, trust_env=False).status_code == 200
        finally:
            process.kill()
            os.close(gate)


def test_a_child_imports_nothing_before_it_knows_its_part() -> None:
    code = (
        "import sys, post_server.serve.child; print(*{'pydantic', 'redis', 'sqlalchemy', 'httpx'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""


def test_nothing_outlives_a_killed_server(home: Path) -> None:
    """Also in a home folder whose path is too long for a socket."""
    settings = settings_for(home / ("long" * 25))
    with serving(settings) as (process, url):
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        descendants = psutil.Process(process.pid).children(recursive=True)
        assert len(descendants) == 4
        process.kill()
        process.wait()
        wait_for(lambda: not any(each.is_running() for each in descendants), STOP_SECONDS + 5)


def _used_port() -> tuple[socket.socket, int]:
    listening = socket.create_server(("127.0.0.1", 0))
    return listening, listening.getsockname()[1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"database_url": "nonsense"}, "POST_DATABASE_URL"),
        ({"database_url": "oracle8://user:secret@host/name"}, "driver"),
        ({"database_url": "sqlite:////proc/none/post.db"}, "database"),
        ({"redis_url": "redis://127.0.0.1:1/0"}, "Redis"),
        ({"redis_url": "nonsense://x"}, "Redis"),
        ({"host": "host.invalid"}, "can't listen on host.invalid"),
    ],
)
def test_errors_are_reported_in_one_line(home: Path, more: dict[str, object], words: str) -> None:
    messages: list[str] = []
    began = time.monotonic()
    assert main(settings_for(home, **more), messages.append) == 1
    assert time.monotonic() - began < 15.0
    assert len(messages) == 1
    assert words in messages[0]
    assert "\n" not in messages[0]
    assert "secret" not in messages[0]
    assert processes_in(home) == []


def test_a_used_port_and_a_home_that_is_a_file(home: Path) -> None:
    listening, port = _used_port()
    messages: list[str] = []
    with listening:
        assert main(settings_for(home, port=port), messages.append) == 1
    (home / "file").write_text("")
    assert main(settings_for(home / "file" / "home"), messages.append) == 1
    assert [f"port {port}" in messages[0], "home folder" in messages[1]] == [True, True]


def test_a_part_that_keeps_dying_is_given_up_with_its_last_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("post_server.serve.children._MIN_PAUSE", 0.01)
    child = Child("part", [sys.executable, "-c", "raise SystemExit('no such luck')"], home / "part.log")

    def tend() -> bool:
        child.tend()
        return False

    with pytest.raises(Unavailable, match=r"the part ended 6 times \(exit status 1\).*no such luck"):
        wait_for(tend, 20.0, 0.01)


def test_the_socket_is_private_for_any_length_of_home(home: Path) -> None:
    with embedded_redis.socket_path(home) as path:
        assert path == home / "redis.sock"
    with embedded_redis.socket_path(home / ("x" * 120)) as path:
        assert len(os.fsencode(path)) < 100
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.parent.exists()


def test_a_redis_url_turns_the_embedded_one_off(home: Path) -> None:
    assert embedded_redis.is_embedded(Settings(home=home))
    assert not embedded_redis.is_embedded(Settings(home=home, redis_url="redis://localhost/0"))
