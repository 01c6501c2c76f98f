"""A PostgreSQL server of the tests' own: initdb and postgres as an unprivileged user, a Unix socket, no network."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
_USER = "postgres"


def binaries() -> Path:
    if not _DEBIAN:
        pytest.skip("PostgreSQL is not installed (./dev setup does it)")
    return _DEBIAN[-1]


def _as_user(*words: str) -> list[str]:
    return (
        ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--init-groups", *words] if os.geteuid() == 0 else [*words]
    )


def name_of(url: str) -> str:
    """The database that a URL names."""
    return url.partition("?")[0].rpartition("/")[2]


class Server:
    """One cluster; its only role is a superuser that everybody who reaches the socket may be."""

    def __init__(self, base: Path) -> None:
        self.base, self.data = base, base / "data"
        self.process: subprocess.Popen[bytes] | None = None
        self._databases, self._shared = 0, ""
        words = ("-D", str(self.data), "-U", _USER, "-A", "trust", "--no-sync", "--locale=C.UTF-8", "-E", "UTF8")
        subprocess.run(_as_user(str(binaries() / "initdb"), *words), check=True, capture_output=True, cwd=base)

    def start(self) -> None:
        words = ("-D", str(self.data), "-k", str(self.base), "-h", "", "-c", "shared_buffers=16MB")
        log = (self.base / "log").open("ab")
        with log:
            self.process = subprocess.Popen(
                _as_user(str(binaries() / "postgres"), *words), stderr=log, stdout=log, cwd=self.base
            )
        limit = time.monotonic() + 30
        while subprocess.run(
            [str(binaries() / "pg_isready"), "-q", "-h", str(self.base)], check=False, capture_output=True
        ).returncode:
            assert time.monotonic() < limit, (self.base / "log").read_text()
            assert self.process.poll() is None, (self.base / "log").read_text()
            time.sleep(0.02)

    def stop(self) -> None:
        """As an administrator restarts it: connections are ended."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
            self.process = None

    def kill(self) -> None:
        """As a crash ends it, every process of it."""
        assert self.process is not None
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(60)
        self.process = None

    def url(self, database: str, password: str = "") -> str:
        user = f"{_USER}:{password}" if password else _USER
        return f"postgresql+psycopg://{user}@/{database}?host={self.base}"

    def new_database(self) -> str:
        """Make an empty database; return its URL."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.execute("postgres", f"create database {name}")
        return self.url(name)

    def clean_database(self) -> str:
        """Empty the database that tests share (making one takes a second); return its URL."""
        if not self._shared:
            self._shared = self.new_database()
        name = name_of(self._shared)
        others = "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> pg_backend_pid()"
        self.execute(name, others, name)
        for number in ("", "_old_1", "_old_2"):
            self.execute(name, f"drop schema if exists vtpm_manager{number} cascade")
        return self._shared

    def execute(self, database: str, statement: str, *values: Any) -> int:
        """Run a statement as an adversary or administrator; return how many rows it touched."""
        import psycopg

        with psycopg.connect(host=str(self.base), user=_USER, dbname=database, autocommit=True) as connection:
            return connection.execute(statement.encode(), values or None).rowcount


@contextmanager
def server() -> Iterator[Server]:
    """A running server, removed afterwards."""
    binaries()
    base = Path(tempfile.mkdtemp(prefix="vtpg"))
    try:
        if os.geteuid() == 0:
            shutil.chown(base, _USER, _USER)
        made = Server(base)
        made.start()
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(base)
