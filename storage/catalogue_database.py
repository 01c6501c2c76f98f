"""The database below the catalogue: a SQLite file, or a PostgreSQL database named by a URL.

Connections, durability, who may write, and what errors mean. No tables here.
"""

import hashlib
import sqlite3
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from storage.errors import (
    BadCatalogueUrl,
    CatalogueBusy,
    CatalogueDamaged,
    CatalogueError,
    CatalogueUnreachable,
    CatalogueUnwritten,
)

Place = Path | str  # of a SQLite file, or a URL

POSTGRESQL_SCHEMA: Final = "vtpm_manager"  # ours in the database: it is renamed whole when a catalogue is rebuilt
_SQLITE_KEPT, _SQLITE_MORE = 5, 10  # connections to the file: kept open once needed, and closed after use
SQLITE_CONNECTIONS_MOST: Final = _SQLITE_KEPT + _SQLITE_MORE  # each has a descriptor of the file and one of its WAL
_BUSY_SECONDS: Final = 5.0
_STATEMENT_SECONDS: Final = 10  # a server that hangs must not hang the manager, which waits for it
_STREAMED: Final = 1000  # rows held at a time
_LOCK: Final = int.from_bytes(hashlib.sha256(b"vtpm-manager catalogue").digest()[:8], "big", signed=True)
_LOCK_SECONDS: Final = 2.0  # a manager that is started right after another was stopped
_LOCK_AGAIN: Final = 0.02
_DRIVER: Final = "postgresql+psycopg"
_UNWRITTEN: Final = frozenset(  # what SQLite says of a full or failing disk (sqlite.org/rescode.html)
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_IOERR_FSYNC,
        sqlite3.SQLITE_IOERR_TRUNCATE,
        sqlite3.SQLITE_IOERR_SHMSIZE,
    }
)
_SECRETS: Final = ("password", "sslpassword")  # parameters of libpq that are none of a log's business


def parse_url(url: str) -> sa.URL:
    """Return the parsed URL of a PostgreSQL database.

    Raises:
        BadCatalogueUrl: it is none; the message does not repeat it.

    """
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise BadCatalogueUrl("it is not of the form postgresql+psycopg://USER@HOST/DATABASE") from error
    if parsed.drivername not in ("postgresql", _DRIVER):
        raise BadCatalogueUrl(f"'{parsed.drivername}' is no database for it: use {_DRIVER}, or none for a SQLite file")
    return parsed.set(drivername=_DRIVER)


def without_secrets(url: str) -> str:
    """Return a URL without its passwords, for messages, status and backups."""
    parsed = parse_url(url)
    return sa.URL.create(
        parsed.drivername,
        username=parsed.username,
        host=parsed.host,
        port=parsed.port,
        database=parsed.database,
        query={name: value for name, value in parsed.query.items() if name not in _SECRETS},
    ).render_as_string(hide_password=False)


def shown(place: Place) -> str:
    """Return how a message names a place: the file's path, or the URL without passwords."""
    return str(place) if isinstance(place, Path) else without_secrets(place)


class Database:
    """Engines for a place. Reading may be done in any thread, changing in one."""

    def __init__(self, place: Place) -> None:
        """Connect to nothing yet. Raises BadCatalogueUrl, CatalogueUnreachable (no driver)."""
        self.place = place
        self._secrets: tuple[str, ...] = ()
        if isinstance(place, Path):
            self.reader = self.writer = _sqlite_engine(place, pool_size=_SQLITE_KEPT, max_overflow=_SQLITE_MORE)
            return
        url = parse_url(place)
        hidden = [url.password or "", *(str(url.query.get(name, "")) for name in _SECRETS)]
        self._secrets = tuple(text for text in hidden if text)
        self.reader, self.writer = _postgresql_engines(url)

    @property
    def is_file(self) -> bool:
        """Tell whether it is a SQLite file."""
        return isinstance(self.place, Path)

    def close(self) -> None:
        """Close every connection, which gives the writer's lock back."""
        self.reader.dispose()
        self.writer.dispose()

    def claim(self) -> None:
        """Become the one that may change it; for a SQLite file the store's lock says so already.

        Raises:
            CatalogueBusy: another manager has it. CatalogueUnreachable.

        """
        with self.told(), self.writer.connect():
            pass

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Yield a connection for a short read."""
        with self.told(), self.reader.connect() as connection:
            yield connection

    @contextmanager
    def stream(self) -> Iterator[sa.Connection]:
        """Yield a connection for a long read of one state of the database, which does not come into memory whole."""
        with self.told(), self.reader.connect() as connection:
            level = {} if self.is_file else {"isolation_level": "REPEATABLE READ"}
            yield connection.execution_options(yield_per=_STREAMED, **level)

    def each(self, query: sa.Select[Any]) -> Generator[dict[str, Any]]:
        """Yield the rows of a long read; close it if you do not read to the end."""
        with self.stream() as connection, connection.execute(query) as rows:
            for row in rows.mappings():
                yield dict(row)

    @contextmanager
    def change(self) -> Iterator[sa.Connection]:
        """Yield a connection whose changes are all made, durably, when the block ends, or none when it raises."""
        with self.told(), self.writer.begin() as connection:
            yield connection

    @contextmanager
    def define(self) -> Iterator[sa.Connection]:
        """Yield a connection as `change` does, where also tables may be made and altered: all of it, or nothing."""
        if not isinstance(self.place, Path):
            with self.change() as connection:
                yield connection
            return
        engine = _sqlite_engine(self.place, poolclass=sa.NullPool)
        # Python's sqlite3 begins no transaction for DDL by itself (docs.sqlalchemy.org, "pysqlite" dialect)
        sa.event.listen(engine, "connect", _no_transactions_of_its_own)
        sa.event.listen(engine, "begin", _begin)
        with self.told(), engine.begin() as connection:
            yield connection

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turn what database and driver raise into our errors, without a password."""
        try:
            yield
        except CatalogueError:
            raise
        except sa.exc.DBAPIError as error:
            raise self._error(error) from error
        except sa.exc.TimeoutError as error:
            raise CatalogueBusy("every connection to it is in use") from error
        except (sa.exc.InvalidRequestError, ValueError, TypeError, AttributeError) as error:
            # SQLite keeps any value in any column: one that no UUID can be made of, no row or two where one belongs
            raise CatalogueDamaged(f"it holds what no catalogue holds ({error})") from error

    def _error(self, error: sa.exc.DBAPIError) -> CatalogueError:
        text = str(error.orig).strip()
        for secret in self._secrets:
            text = text.replace(secret, "***")
        if isinstance(error.orig, sqlite3.Error):  # also while rows are copied from a file to a server
            if getattr(error.orig, "sqlite_errorcode", None) in _UNWRITTEN:
                return CatalogueUnwritten(text)
            return CatalogueBusy(text) if "locked" in text else CatalogueDamaged(text)
        if error.connection_invalidated or isinstance(error, sa.exc.OperationalError):
            return CatalogueUnreachable(shown(self.place), text)
        return CatalogueDamaged(text)


def _sqlite_engine(path: Path, **more: Any) -> sa.Engine:
    url = sa.URL.create("sqlite", database=str(path))  # a path may have characters that mean something in a URL
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_SECONDS}, hide_parameters=True, **more)
    sa.event.listen(engine, "connect", _on_sqlite_connect)
    return engine


def _on_sqlite_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    connection.execute("pragma foreign_keys = on")


def _no_transactions_of_its_own(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("begin immediate")


def _postgresql_engines(url: sa.URL) -> tuple[sa.Engine, sa.Engine]:
    given = url.query.get("options", "")
    options = f"{given} -c search_path={POSTGRESQL_SCHEMA} -c statement_timeout={_STATEMENT_SECONDS}s"
    arguments = {
        "options": options.strip(),
        "connect_timeout": int(_BUSY_SECONDS),
        "tcp_user_timeout": _STATEMENT_SECONDS * 1000,
        "application_name": "vtpm-manager",
    }
    url = url.difference_update_query(["options"])

    def engine(**more: Any) -> sa.Engine:
        try:
            # pre_ping: a server that was restarted costs a new connection, not a failed verb
            return sa.create_engine(url, connect_args=arguments, pool_pre_ping=True, hide_parameters=True, **more)
        except ModuleNotFoundError as error:
            raise CatalogueUnreachable(
                without_secrets(url.render_as_string(hide_password=False)),
                "its driver is not installed: pip install 'vtpm-manager[postgresql]'",
            ) from error

    reader = engine(isolation_level="AUTOCOMMIT", pool_size=2, max_overflow=8, pool_timeout=_BUSY_SECONDS)
    writer = engine(pool_size=1, max_overflow=0, pool_timeout=_BUSY_SECONDS)
    sa.event.listen(writer, "connect", _on_writer_connect)
    return reader, writer


def _take_lock(connection: Any) -> None:
    """Be the only one; who closed his connection just now holds it until his server process has noticed."""
    limit = time.monotonic() + _LOCK_SECONDS
    while not connection.execute("select pg_try_advisory_lock(%s)", (_LOCK,)).fetchone()[0]:
        if time.monotonic() > limit:
            raise CatalogueBusy("another vtpm-manager uses this database")
        time.sleep(_LOCK_AGAIN)


def _on_writer_connect(connection: Any, _record: object) -> None:
    """Make a writer's connection durable and the only one: a lock that goes when the connection does."""
    try:
        row = connection.execute("select current_setting('synchronous_commit'), current_setting('fsync')").fetchone()
        if row[1] != "on":
            raise CatalogueDamaged("this server runs with fsync = off: what it acknowledges is lost in a power cut")
        if row[0] == "off":
            connection.execute("set session synchronous_commit = on")
        _take_lock(connection)
        connection.commit()
    except BaseException:
        connection.close()
        raise
