"""The catalogue: names, guests, attachments, events. No secret is in it, and the store image stays the authority.

Rows that decide who gets which vTPM carry a MAC under a key derived from the store key: a row that the manager did
not write is refused. The only module that imports SQLAlchemy.
"""

import hmac
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self
from uuid import UUID

import sqlalchemy as sa

from storage.errors import CatalogueDamaged, CatalogueTooNew, NameTaken, NoSuchRow, RowTampered

SCHEMA: Final = 1
_BUSY_SECONDS: Final = 5.0

_metadata = sa.MetaData()
_about = sa.Table("about", _metadata, sa.Column("schema", sa.Integer, nullable=False))
_groups = sa.Table(
    "groups",
    _metadata,
    sa.Column("uuid", sa.Uuid, primary_key=True),
    sa.Column("name", sa.String(64), nullable=False, unique=True),
)
_vtpms = sa.Table(
    "vtpms",
    _metadata,
    sa.Column("uuid", sa.Uuid, primary_key=True),
    sa.Column("name", sa.String(64), nullable=False, unique=True),
    sa.Column("group", sa.Uuid, nullable=False, index=True),
    sa.Column("family", sa.String(3), nullable=False),
    sa.Column("state_image", sa.Text, nullable=False),
    sa.Column("created", sa.String(32), nullable=False),
    sa.Column("mac", sa.LargeBinary(32), nullable=False),
)
_attachments = sa.Table(
    "attachments",
    _metadata,
    sa.Column("vtpm", sa.Uuid, primary_key=True),
    sa.Column("guest", sa.String(64), nullable=False, index=True),
    sa.Column("frontend", sa.String(16), nullable=False),
    sa.Column("owner", sa.String(32), nullable=False),
    sa.Column("mode", sa.String(8), nullable=False),
    sa.Column("startup", sa.String(8), nullable=False),
    sa.Column("lease", sa.BigInteger, nullable=False),
    sa.Column("created", sa.String(32), nullable=False),
    sa.Column("mac", sa.LargeBinary(32), nullable=False),
)
_events = sa.Table(
    "events",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("time", sa.String(32), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("vtpm", sa.Uuid, nullable=True, index=True),
    sa.Column("text", sa.Text, nullable=False),
)


@dataclass(frozen=True, slots=True)
class VtpmRow:
    """A vTPM's name and place. `state_image` is empty for one in the state directory; `created` is UTC, ISO 8601."""

    uuid: UUID
    name: str
    group: UUID
    family: str
    state_image: str = ""
    created: str = ""


@dataclass(frozen=True, slots=True)
class AttachmentRow:
    """Which guest a vTPM runs for, and how. `lease` grows with each start of an instance."""

    vtpm: UUID
    guest: str
    frontend: str
    owner: str
    mode: str
    startup: str
    lease: int
    created: str = ""


@dataclass(frozen=True, slots=True)
class GroupRow:
    """A group's name; everything else about it is in the store."""

    uuid: UUID
    name: str


@dataclass(frozen=True, slots=True)
class EventRow:
    """Something that happened."""

    time: str
    kind: str
    vtpm: UUID | None
    text: str


class Catalogue:
    """An open catalogue. Used from one thread; every change is durable when the call returns."""

    def __init__(self, engine: sa.Engine, mac_key: bytes) -> None:
        """Use `create` or `open`."""
        self._engine, self._mac_key = engine, mac_key

    @classmethod
    def create(cls, path: Path, mac_key: bytes) -> Self:
        """Make an empty catalogue at `path`, which must not exist; `mac_key` has 32 bytes.

        Raises:
            NameTaken: something is there. CatalogueDamaged: it cannot be made.

        """
        try:
            path.touch(mode=0o600, exist_ok=False)
        except FileExistsError as error:
            raise NameTaken(str(path)) from error
        catalogue = cls(_engine(path), mac_key)
        with catalogue._change() as connection:
            _metadata.create_all(connection)
            connection.execute(_about.insert().values(schema=SCHEMA))
        return catalogue

    @classmethod
    def open(cls, path: Path, mac_key: bytes) -> Self:
        """Open a catalogue and check every row that carries a MAC.

        Raises:
            CatalogueDamaged: missing, or no catalogue. CatalogueTooNew. RowTampered.

        """
        if not path.exists():
            raise CatalogueDamaged(f"{path} is missing")
        catalogue = cls(_engine(path), mac_key)
        try:
            with catalogue._read() as connection:
                version = connection.execute(sa.select(_about.c.schema)).scalar_one()
            if not isinstance(version, int):
                raise CatalogueDamaged("it does not say which schema it has")
            if version > SCHEMA:
                raise CatalogueTooNew(version, SCHEMA)
            catalogue.vtpms()
            catalogue.attachments()
        except BaseException:
            catalogue.close()
            raise
        return catalogue

    def close(self) -> None:
        """Close the database."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- vTPMs and groups --------------------------------------------------------------------------

    def find_vtpm(self, uuid: UUID) -> VtpmRow | None:
        """Return a vTPM's row, None where there is none. Raises RowTampered."""
        return self._one_vtpm(_vtpms.c.uuid == uuid)

    def find_vtpm_by_name(self, name: str) -> VtpmRow | None:
        """Return the row of the vTPM with this name, None where there is none. Raises RowTampered."""
        return self._one_vtpm(_vtpms.c.name == name)

    def vtpms(self) -> list[VtpmRow]:
        """Return every vTPM. Raises RowTampered."""
        with self._read() as connection:
            return [self._vtpm(row) for row in connection.execute(sa.select(_vtpms))]

    def add_vtpm(self, row: VtpmRow) -> VtpmRow:
        """Add a vTPM and return its row with `created` filled in. Raises NameTaken."""
        row = replace(row, created=row.created or now())
        self._insert(_vtpms, asdict(row), f"vTPM {row.name}")
        return row

    def remove_vtpm(self, uuid: UUID) -> None:
        """Remove a vTPM's row. Raises NoSuchRow."""
        self._delete(_vtpms, _vtpms.c.uuid == uuid, f"vTPM {uuid}")

    def groups(self) -> list[GroupRow]:
        """Return every group."""
        with self._read() as connection:
            return [GroupRow(row.uuid, row.name) for row in connection.execute(sa.select(_groups))]

    def find_group_by_name(self, name: str) -> GroupRow | None:
        """Return the group with this name, None where there is none."""
        return next((row for row in self.groups() if row.name == name), None)

    def add_group(self, row: GroupRow) -> None:
        """Add a group. Raises NameTaken."""
        with self._change() as connection:
            try:
                connection.execute(_groups.insert().values(asdict(row)))
            except sa.exc.IntegrityError as error:
                raise NameTaken(f"group {row.name}") from error

    # --- attachments -------------------------------------------------------------------------------

    def find_attachment(self, vtpm: UUID) -> AttachmentRow | None:
        """Return a vTPM's attachment, None where it has none. Raises RowTampered."""
        with self._read() as connection:
            row = connection.execute(sa.select(_attachments).where(_attachments.c.vtpm == vtpm)).one_or_none()
        return None if row is None else self._attachment(row)

    def attachments(self) -> list[AttachmentRow]:
        """Return every attachment. Raises RowTampered."""
        with self._read() as connection:
            return [self._attachment(row) for row in connection.execute(sa.select(_attachments))]

    def attach(self, row: AttachmentRow) -> None:
        """Add an attachment. Raises NameTaken when the vTPM has one."""
        self._insert(_attachments, asdict(replace(row, created=row.created or now())), f"an attachment of {row.vtpm}")

    def renew(self, row: AttachmentRow) -> None:
        """Replace a vTPM's attachment. Raises NoSuchRow."""
        values = asdict(row)
        with self._change() as connection:
            done = connection.execute(
                _attachments.update()
                .where(_attachments.c.vtpm == row.vtpm)
                .values(values | {"mac": self._mac("attachments", values)})
            )
            if done.rowcount != 1:
                raise NoSuchRow(f"an attachment of vTPM {row.vtpm}")

    def detach(self, vtpm: UUID) -> None:
        """Remove a vTPM's attachment. Raises NoSuchRow."""
        self._delete(_attachments, _attachments.c.vtpm == vtpm, f"an attachment of vTPM {vtpm}")

    # --- events ------------------------------------------------------------------------------------

    def log(self, kind: str, vtpm: UUID | None, text: str) -> None:
        """Keep an event; `kind` is one word, `text` a sentence without any secret."""
        with self._change() as connection:
            connection.execute(_events.insert().values(time=now(), kind=kind, vtpm=vtpm, text=text))

    def events(self, vtpm: UUID | None = None) -> list[EventRow]:
        """Return the events of a vTPM, or all, oldest first."""
        query = sa.select(_events).order_by(_events.c.id)
        if vtpm is not None:
            query = query.where(_events.c.vtpm == vtpm)
        with self._read() as connection:
            return [EventRow(row.time, row.kind, row.vtpm, row.text) for row in connection.execute(query)]

    # --- inside ------------------------------------------------------------------------------------

    def _one_vtpm(self, condition: sa.ColumnElement[bool]) -> VtpmRow | None:
        with self._read() as connection:
            row = connection.execute(sa.select(_vtpms).where(condition)).one_or_none()
        return None if row is None else self._vtpm(row)

    def _vtpm(self, row: sa.Row[Any]) -> VtpmRow:
        values = self._authentic("vtpms", row, f"vTPM {row.name}")
        return VtpmRow(**values)

    def _attachment(self, row: sa.Row[Any]) -> AttachmentRow:
        values = self._authentic("attachments", row, f"vTPM {row.vtpm} for guest {row.guest}")
        return AttachmentRow(**values)

    def _authentic(self, table: str, row: sa.Row[Any], what: str) -> dict[str, Any]:
        values = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name for a row as a mapping
        mac = values.pop("mac")
        if not isinstance(mac, bytes) or not hmac.compare_digest(mac, self._mac(table, values)):
            raise RowTampered(table, what)
        return values

    def _mac(self, table: str, values: dict[str, Any]) -> bytes:
        """HMAC-SHA256 over the table's name and the row as canonical JSON (keys sorted, UUIDs as text)."""
        canonical = json.dumps([table, values], sort_keys=True, separators=(",", ":"), default=str)
        return hmac.digest(self._mac_key, canonical.encode(), "sha256")

    def _insert(self, table: sa.Table, values: dict[str, Any], what: str) -> None:
        with self._change() as connection:
            try:
                connection.execute(table.insert().values(values | {"mac": self._mac(table.name, values)}))
            except sa.exc.IntegrityError as error:
                raise NameTaken(what) from error

    def _delete(self, table: sa.Table, condition: sa.ColumnElement[bool], what: str) -> None:
        with self._change() as connection:
            if connection.execute(table.delete().where(condition)).rowcount != 1:
                raise NoSuchRow(what)

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except sa.exc.DatabaseError as error:
            raise CatalogueDamaged(str(error.orig)) from error
        except (sa.exc.InvalidRequestError, ValueError, TypeError, AttributeError) as error:
            # SQLite keeps any value in any column: one that no UUID can be made of, no row or two where one belongs
            raise CatalogueDamaged(f"it holds what no catalogue holds ({error})") from error

    @contextmanager
    def _change(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.DatabaseError as error:
            raise CatalogueDamaged(str(error.orig)) from error


def now() -> str:
    """Return the time of now, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _engine(path: Path) -> sa.Engine:
    url = sa.URL.create("sqlite", database=str(path))  # a path may have characters that mean something in a URL
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_SECONDS})
    sa.event.listen(engine, "connect", _on_connect)
    return engine


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    connection.execute("pragma foreign_keys = on")
