"""The real parts that take the embedded ones' places: PostgreSQL and an S3 server, started from their programs.

Nothing is left running or lying about after ``close``.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from post_server.db.database import Database
from post_server.db.tables import Base

LOOPBACK = "127.0.0.1"
_START_SECONDS = 100.0


def postgres_program(name: str) -> str | None:
    """A program of PostgreSQL: where Debian keeps it, the newest version first, or on the PATH."""
    kept = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    return str(kept[-1]) if kept else shutil.which(name)


def missing_parts() -> list[str]:
    """What has to be installed before the tests can run on the real parts."""
    programs = {
        "redis-server": shutil.which("redis-server"),
        "postgresql": postgres_program("postgres") and postgres_program("initdb"),
    }
    packages = {name: find_spec(name) for name in ("psycopg", "s3fs", "moto")}
    return [name for name, found in {**programs, **packages}.items() if not found]


def free_port(address: str = LOOPBACK) -> int:
    """A port that nothing listens on at this moment."""
    with socket.create_server((address, 0)) as listening:
        return int(listening.getsockname()[1])


class Part:
    """A server in a folder of its own, listening on ``address`` and ``port``."""

    def __init__(self, address: str = LOOPBACK) -> None:
        self.address, self.port = address, free_port(address)
        self.folder = Path(tempfile.mkdtemp(prefix="post-part-"))
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = self._start()
            self._wait()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop it at once and remove its folder."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # a child of it would outlive a SIGKILL
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    def _look(self) -> None:
        """Raise as long as it doesn't answer."""
        raise NotImplementedError

    def _run(self, argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(argv, stdout=log, stderr=log, **options)

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return self._look()
            except Exception as error:
                if time.monotonic() > deadline or self._process is None or self._process.poll() is not None:
                    raise RuntimeError((self.folder / "log").read_text("utf-8", "replace")[-2000:]) from error
            time.sleep(0.1)


class Postgres(Part):
    """PostgreSQL in a time zone that is not UTC, to be seen; each test gets a database of its own."""

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"post_{secrets.token_hex(8)}"
        self.administer(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://post@{self.address}:{self.port}/{name}"

    @cached_property
    def shared_database(self) -> str:
        """The URL of a migrated database for one test after the other; see :meth:`empty`."""
        url = self.new_database()
        database = Database(url)
        database.migrate()
        database.dispose()
        return url

    def empty(self, url: str) -> None:
        """End what is still connected to a migrated database and remove all rows."""
        name = url.rsplit("/", 1)[-1]
        self.administer(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
        without_triggers = "SET session_replication_role = replica"  # the audit log refuses to be emptied
        self.administer(f"{without_triggers}; TRUNCATE {tables}", name)

    def administer(self, statement: str, database: str = "postgres") -> None:
        """Run one statement as the superuser."""
        import psycopg

        at = f"host={self.address} port={self.port} user=post dbname={database} connect_timeout=5"
        with psycopg.connect(at, autocommit=True) as connection:
            connection.execute(statement.encode())

    def _start(self) -> subprocess.Popen[bytes]:
        """As another user if we are root, which PostgreSQL refuses."""
        data, account = self.folder / "data", _unprivileged()
        data.mkdir()
        if account:
            os.chown(data, account["user"], account["group"])
            self.folder.chmod(0o755)
        make = ["-D", str(data), "-U", "post", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
        if self._run([str(postgres_program("initdb")), *make], cwd=data, **account).wait():
            raise RuntimeError((self.folder / "log").read_text("utf-8", "replace")[-2000:])
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all samenet trust\n")
        own: dict[str, object] = {"listen_addresses": self.address, "port": self.port, "max_connections": 200}
        own |= {"unix_socket_directories": data, "fsync": "off", "timezone": "Asia/Kolkata"}
        serve = [str(postgres_program("postgres")), "-D", str(data)]
        return self._run([*serve, *(f"--{name}={value}" for name, value in own.items())], cwd=data, **account)

    def _look(self) -> None:
        self.administer("SELECT 1")


class ObjectStore(Part):
    """An S3 server; each test gets a bucket of its own."""

    @property
    def environment(self) -> dict[str, str]:
        """What the AWS libraries of a process read to find it."""
        keys = {"AWS_ACCESS_KEY_ID": "post", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        return {**keys, "AWS_ENDPOINT_URL": f"http://{self.address}:{self.port}"}

    def new_bucket(self) -> str:
        """The URL of a place in a bucket that did not exist before."""
        import fsspec

        bucket = f"post-{secrets.token_hex(8)}"
        fsspec.filesystem("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"]).mkdir(bucket)
        return f"s3://{bucket}/blobs"

    def _start(self) -> subprocess.Popen[bytes]:
        return self._run([sys.executable, "-m", "moto.server", "-H", self.address, "-p", str(self.port)])

    def _look(self) -> None:
        socket.create_connection((self.address, self.port), 1.0).close()


def _unprivileged() -> dict[str, Any]:
    """How to start a process as a user who isn't root; nothing where we aren't."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            found = pwd.getpwnam(name)
            return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    raise RuntimeError("PostgreSQL can't run as root, and there is no user 'postgres' or 'nobody'")
