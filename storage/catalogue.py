"""The catalogue: names, guests, attachments, events. No secret is in it, and the store image stays the authority.

Rows that decide who gets which vTPM carry a MAC under a key derived from the store key: a row that the manager did
not write is refused. The only module that imports SQLAlchemy.
"""

import hmac
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self
from uuid import UUID

import sqlalchemy as sa

from storage.catalogue_rows import AttachmentRow, Audit, EventRow, Filter, GroupRow, VtpmRow
from storage.errors import CatalogueDamaged, CatalogueTooNew, NameTaken, NoSuchRow, RowTampered

__all__ = ["AttachmentRow", "Audit", "Catalogue", "EventRow", "Filter", "GroupRow", "VtpmRow", "now"]

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
    def open(cls, path: Path, mac_key: bytes, *, check_rows: bool = True) -> Self:
        """Open a catalogue and check every row that carries a MAC (without `check_rows`, for `audit`, none).

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
            if check_rows:
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

    def add_vtpms(self, rows: Sequence[VtpmRow], kind: str, text: str) -> list[VtpmRow]:
        """Add vTPMs, each with an event of this kind and text after its name; all of them, or none.

        Returns the rows with `created` filled in. Raises NameTaken.
        """
        time = now()
        rows = [replace(row, created=row.created or time) for row in rows]
        values = [asdict(row) for row in rows]
        events = [{"time": time, "kind": kind, "vtpm": row.uuid, "text": f"{row.name}{text}"} for row in rows]
        with self._change() as connection:
            try:
                connection.execute(_vtpms.insert(), [row | {"mac": self._mac("vtpms", row)} for row in values])
            except sa.exc.IntegrityError as error:
                raise NameTaken("one of these names or UUIDs") from error
            connection.execute(_events.insert(), events)
        return rows

    def names(self) -> set[str]:
        """Return every name in use, unchecked."""
        with self._read() as connection:
            return set(connection.execute(sa.select(_vtpms.c.name)).scalars())

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

    # --- all of it ---------------------------------------------------------------------------------

    def audit(self) -> Audit:
        """Read every row that carries a MAC, and say which of them fail it. May run in another thread."""
        found = Audit([], [], [])
        with self._read() as connection:
            for row in connection.execute(sa.select(_vtpms)):
                with _collected(found.tampered):
                    found.vtpms.append(self._vtpm(row))
            for row in connection.execute(sa.select(_attachments)):
                with _collected(found.tampered):
                    found.attachments.append(self._attachment(row))
        return found

    def listing(self, only: Filter, after: str, limit: int) -> list[tuple[VtpmRow, AttachmentRow | None]]:
        """Return at most `limit` vTPMs by name, from behind the name `after`, with their attachments: one query.

        Raises:
            RowTampered: a row that is read fails its MAC.

        """
        query = (
            sa.select(*_vtpms.c, *(column.label(f"a_{column.name}") for column in _attachments.c))
            .select_from(_vtpms.outerjoin(_attachments, _attachments.c.vtpm == _vtpms.c.uuid))
            .where(_vtpms.c.name > after)
            .order_by(_vtpms.c.name)
            .limit(limit)
        )
        for column, wanted in (
            (_vtpms.c.group, only.group),
            (_vtpms.c.family, only.family),
            (_attachments.c.guest, only.guest),
        ):
            if wanted is not None:
                query = query.where(column == wanted)
        with self._read() as connection:
            return [self._joined(row) for row in connection.execute(query)]

    def _joined(self, row: sa.Row[Any]) -> tuple[VtpmRow, AttachmentRow | None]:
        values = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name for a row as a mapping
        mine = {name: value for name, value in values.items() if not name.startswith("a_")}
        its = {name.removeprefix("a_"): value for name, value in values.items() if name.startswith("a_")}
        vtpm = VtpmRow(**self._authentic("vtpms", mine, f"vTPM {mine['name']}"))
        if its["vtpm"] is None:
            return vtpm, None
        what = f"vTPM {its['vtpm']} for guest {its['guest']}"
        return vtpm, AttachmentRow(**self._authentic("attachments", its, what))

    def snapshot(self) -> bytes:
        """Return the bytes of a database file with everything that is in the catalogue now, for a backup."""
        with self._read() as connection, closing(sqlite3.connect(":memory:")) as copy:
            driver = connection.connection.driver_connection
            assert isinstance(driver, sqlite3.Connection), "_engine makes SQLite engines"
            driver.backup(copy)
            return copy.serialize()

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
        values = self._authentic("vtpms", dict(row._mapping), f"vTPM {row.name}")  # noqa: SLF001 - see _joined
        return VtpmRow(**values)

    def _attachment(self, row: sa.Row[Any]) -> AttachmentRow:
        what = f"vTPM {row.vtpm} for guest {row.guest}"
        values = self._authentic("attachments", dict(row._mapping), what)  # noqa: SLF001 - see _joined
        return AttachmentRow(**values)

    def _authentic(self, table: str, values: dict[str, Any], what: str) -> dict[str, Any]:
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


@contextmanager
def _collected(tampered: list[RowTampered]) -> Iterator[None]:
    try:
        yield
    except RowTampered as error:
        tampered.append(error)


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
