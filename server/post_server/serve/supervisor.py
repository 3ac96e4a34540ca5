"""``post serve``: starts, watches and stops every part of the provider side on one machine."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from post_server.serve import embedded_redis
from post_server.serve.children import Child, Stopping, stop
from post_server.serve.home_lock import announce, locked_home
from post_server.settings import Settings
from post_shared.errors import PostError, Unavailable

_START_SECONDS = 120.0
_TICK = 0.1

Say = Callable[[str], None]


def main(settings: Settings, say: Say | None = None) -> int:
    """Serve until a signal arrives; returns the exit status. An error is one line.

    The URL goes to standard output once the server answers, everything else to ``say`` (default: standard error).
    """
    say = say or _to_stderr
    try:
        with _signals() as stopping, _private_files():
            Supervisor(settings, stopping, say).run()
    except PostError as error:
        say(error.detail)
        return 1
    except OSError as error:  # a full disk, too many processes
        say(f"the operating system reports: {error}")
        return 1
    return 0


class Supervisor:
    """Starts the parts in order, restarts them if they die, and stops Redis last."""

    def __init__(self, settings: Settings, stopping: Stopping, say: Say) -> None:
        self.settings, self.stopping, self.say = settings, stopping, say
        self.redis: Child | None = None
        self.parts: list[Child] = []

    def run(self) -> None:
        """Start the parts and watch them until a signal arrives.

        Raises:
            Unavailable: a part can't be started, or it died too often.
        """
        with ExitStack() as stack:
            home = stack.enter_context(locked_home(self.settings.home))
            listening = stack.enter_context(_listen(self.settings.host, self.settings.port))
            url = _url(self.settings.host, listening)
            environment = _environment(self.settings)
            stack.callback(self._stop)
            if embedded_redis.is_embedded(self.settings):
                path = stack.enter_context(embedded_redis.socket_path(home))
                stack.callback(self._stop)  # before the temporary folder is removed
                environment["POST_REDIS_URL"] = f"unix://{path}"
                self._start_redis(path)
            gate, opener = (stack.enter_context(open(end, mode)) for end, mode in zip(os.pipe(), "rw", strict=True))
            self._start("api", environment, listening.fileno(), gate.fileno())
            self._prepare(environment.get("POST_REDIS_URL", self.settings.redis_url))
            opener.close()
            self._start("worker", environment)
            self._start("predictor", environment)
            if self._until_ready(url):
                announce(home, url)
                print(url, flush=True)
                self._watch()

    # --- the parts ------------------------------------------------------------------------------------

    def _child(self, name: str, *arguments: str, **more: object) -> Child:
        argv = [sys.executable, "-m", "post_server.serve.child", *arguments]
        return Child(name, argv, self.settings.home / "logs" / f"{name}.log", **more)  # type: ignore[arg-type]

    def _start_redis(self, path: Path) -> None:
        command = embedded_redis.command(embedded_redis.find_program(), path)
        self.redis = self._child("redis", "run", *command)
        self.redis.start()

    def _start(self, name: str, environment: dict[str, str], *inherited: int) -> None:
        child = self._child(name, name, *map(str, inherited), environment=environment, inherited=inherited)
        self.parts.append(child)
        child.start()

    def _prepare(self, redis_url: str) -> None:
        """Migrate the database and wait for the broker, while Redis and the API start."""
        from post_server.serve.preflight import await_redis, migrate

        migrate(self.settings)
        await_redis(redis_url, self.redis, self.stopping)

    def _tend(self) -> None:
        for child in [self.redis, *self.parts]:
            if child is not None and (message := child.tend()):
                self.say(message)
        time.sleep(_TICK)

    def _watch(self) -> None:
        while not self.stopping:
            self._tend()

    def _until_ready(self, url: str) -> bool:
        """Wait until the API reports that it is ready; false if a signal arrives first."""
        deadline = time.monotonic() + _START_SECONDS
        while not self.stopping:
            self._tend()
            if _is_ready(url):
                return True
            if time.monotonic() > deadline:
                logs = self.settings.home / "logs"
                raise Unavailable(f"the server isn't ready after {_START_SECONDS:.0f} s; see {logs}")
        return False

    def _stop(self) -> None:
        """Redis stops last: the others still use it while they end."""
        parts, self.parts = self.parts, []
        killed = stop(parts, self.settings.stop_seconds)
        if self.redis is not None:
            killed += stop([self.redis], 2.0)
            self.redis = None
        if killed:
            self.say(f"had to kill: {', '.join(killed)}")


# --- socket, signals, files -----------------------------------------------------------------------------


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """The API's socket, bound here: port 0 is resolved, and a restart of the API loses no connection."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
    except OSError as error:
        raise Unavailable(f"can't listen on {host}: {error.strerror or error}") from error
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
            listening.listen(1024)
        except OSError as error:
            raise Unavailable(
                f"can't listen on {host}, port {port}: {error.strerror}; choose another port (0: any free one)"
            ) from error
        yield listening


def _url(host: str, listening: socket.socket) -> str:
    port = listening.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _is_ready(url: str) -> bool:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=2.0)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _environment(settings: Settings) -> dict[str, str]:
    """The settings as environment variables, so that the parts get ours, whatever their source."""
    return {f"POST_{name.upper()}": str(value) for name, value in settings.model_dump().items()}


@contextmanager
def _signals() -> Iterator[Stopping]:
    stopping = Stopping()

    def count(_number: int, _frame: object) -> None:
        stopping.count += 1
        if stopping.count > 2:  # the third signal ends us at once; the parts end with us
            os._exit(1)

    previous = {number: signal.signal(number, count) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _private_files() -> Iterator[None]:
    """Nobody else can read the files that we and our parts write, whatever the mode of the home folder."""
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


def _to_stderr(line: str) -> None:
    print(f"post serve: {line}", file=sys.stderr, flush=True)
