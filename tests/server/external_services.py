"""Real services in place of the embedded ones: PostgreSQL and an S3 server, started from their programs.

No process and no file is left after ``close``.
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
    """The path of a PostgreSQL program: Debian's newest version, or on the PATH."""
    paths = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    return str(paths[-1]) if paths else shutil.which(name)


def missing_programs() -> list[str]:
    """Programs and packages that must be installed for the tests with real services."""
    programs = {
        "redis-server": shutil.which("redis-server"),
        "postgresql": postgres_program("postgres") and postgres_program("initdb"),
    }
    packages = {name: find_spec(name) for name in ("psycopg", "s3fs", "moto")}
    return [name for name, found in {**programs, **packages}.items() if not found]


def free_port(address: str = LOOPBACK) -> int:
    """A port on which nothing listens at the moment."""
    with socket.create_server((address, 0)) as listening:
        return int(listening.getsockname()[1])


class Service:
    """A server with its own folder, listening on ``address`` and ``port``."""

    def __init__(self, address: str = LOOPBACK) -> None:
        self.address, self.port = address, free_port(address)
        self.folder = Path(tempfile.mkdtemp(prefix="post-part-"))
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = self._start()
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop it immediately and remove its folder."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # its children would outlive a SIGKILL
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    def _check(self) -> None:
        """Raise as long as the server doesn't answer."""
        raise NotImplementedError

    def _run(self, argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(argv, stdout=log, stderr=log, **options)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return self._check()
            except Exception as error:
                if time.monotonic() > deadline or self._process is None or self._process.poll() is not None:
                    raise RuntimeError((self.folder / "log").read_text("utf-8", "replace")[-2000:]) from error
            time.sleep(0.1)


class Postgres(Service):
    """PostgreSQL, in a time zone other than UTC to reveal errors; each test gets its own database."""

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"post_{secrets.token_hex(8)}"
        self.administer(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://post@{self.address}:{self.port}/{name}"

    @cached_property
    def shared_database(self) -> str:
        """The URL of a migrated database that consecutive tests share; see :meth:`empty`."""
        url = self.new_database()
        database = Database(url)
        database.migrate()
        database.dispose()
        return url

    def empty(self, url: str) -> None:
        """Close all connections to a migrated database and remove all its rows."""
        name = url.rsplit("/", 1)[-1]
        self.administer(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
        without_triggers = "SET session_replication_role = replica"  # a trigger protects the audit log
        self.administer(f"{without_triggers}; TRUNCATE {tables}", name)

    def administer(self, statement: str, database: str = "postgres") -> None:
        """Run one statement as the superuser."""
        import psycopg

        conninfo = f"host={self.address} port={self.port} user=post dbname={database} connect_timeout=5"
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute(statement.encode())

    def _start(self) -> subprocess.Popen[bytes]:
        """PostgreSQL refuses to run as root, so then start it as another user."""
        data, account = self.folder / "data", _unprivileged()
        data.mkdir()
        if account:
            os.chown(data, account["user"], account["group"])
            self.folder.chmod(0o755)
        options = ["-D", str(data), "-U", "post", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
        if self._run([str(postgres_program("initdb")), *options], cwd=data, **account).wait():
            raise RuntimeError((self.folder / "log").read_text("utf-8", "replace")[-2000:])
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all samenet trust\n")
        config: dict[str, object] = {"listen_addresses": self.address, "port": self.port, "max_connections": 200}
        config |= {"unix_socket_directories": data, "fsync": "off", "timezone": "Asia/Kolkata"}
        serve = [str(postgres_program("postgres")), "-D", str(data)]
        return self._run([*serve, *(f"--{name}={value}" for name, value in config.items())], cwd=data, **account)

    def _check(self) -> None:
        self.administer("SELECT 1")


class ObjectStore(Service):
    """An S3 server; each test gets its own bucket."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which AWS libraries find it."""
        keys = {"AWS_ACCESS_KEY_ID": "post", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        return {**keys, "AWS_ENDPOINT_URL": f"http://{self.address}:{self.port}"}

    def new_bucket(self) -> str:
        """The URL of a folder in a new bucket."""
        import fsspec

        bucket = f"post-{secrets.token_hex(8)}"
        fsspec.filesystem("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"]).mkdir(bucket)
        return f"s3://{bucket}/blobs"

    def _start(self) -> subprocess.Popen[bytes]:
        return self._run([sys.executable, "-m", "moto.server", "-H", self.address, "-p", str(self.port)])

    def _check(self) -> None:
        socket.create_connection((self.address, self.port), 1.0).close()


def _unprivileged() -> dict[str, Any]:
    """Options that start a process as an unprivileged user if we are root; otherwise none."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            account = pwd.getpwnam(name)
            return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    raise RuntimeError("PostgreSQL can't run as root, and there is no user 'postgres' or 'nobody'")
