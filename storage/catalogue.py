"""The catalogue: names, labels, guests, attachments, events. No secret is in it, and the store image is the authority.

Rows that decide who gets which vTPM carry a MAC under a key derived from the store key: a row that the manager did
not write is refused. SQLAlchemy is imported by the modules `catalogue*` and `migrations` only.
"""

from pathlib import Path
from typing import Self
from uuid import UUID

import sqlalchemy as sa

from storage import catalogue_schema as schema
from storage.catalogue_attachments import Attachments
from storage.catalogue_copy import drop_tables, fill_from_file, make_schema, snapshot_of, vacuum
from storage.catalogue_database import POSTGRESQL_SCHEMA, Database, Place, shown, without_secrets
from storage.catalogue_events import Events
from storage.catalogue_part import now
from storage.catalogue_rows import AttachmentRow, Audit, EventRow, Filter, GroupRow, Happened, Listed, VtpmRow
from storage.catalogue_schema import SCHEMA
from storage.catalogue_vtpms import Vtpms
from storage.errors import CatalogueDamaged, CatalogueForeign, CatalogueTooNew, CatalogueTooOld, NameTaken

__all__ = [
    "AttachmentRow",
    "Audit",
    "Catalogue",
    "EventRow",
    "Filter",
    "GroupRow",
    "Happened",
    "Listed",
    "Place",
    "VtpmRow",
    "now",
    "shown",
    "without_secrets",
]


class Catalogue(Vtpms, Attachments, Events):
    """An open catalogue. Changed from one thread; every change is durable when the call returns.

    Every method raises CatalogueError: damaged, busy, or, on PostgreSQL, unreachable.
    """

    @classmethod
    def create(cls, place: Place, mac_key: bytes, store: UUID | None = None) -> Self:
        """Make an empty catalogue of `store` in a file or schema that must not exist; `mac_key` has 32 bytes.

        Raises:
            NameTaken: something is there. CatalogueDamaged, CatalogueUnreachable: it cannot be made.

        """
        database = _made(place)
        try:
            with database.define() as connection:
                if not database.is_file:
                    make_schema(connection)
                schema.make_tables(connection)
                connection.execute(schema.about.insert(), {"schema": SCHEMA, "store": store})
        except BaseException:
            database.close()
            raise
        return cls(database, mac_key)

    @classmethod
    def open(
        cls,
        place: Place,
        mac_key: bytes,
        store: UUID | None = None,
        *,
        check_rows: bool = True,
        change: bool = True,
    ) -> Self:
        """Open a catalogue and check every row that carries a MAC (without `check_rows`, for `audit`, none).

        An older schema is migrated, after a copy of the file was kept. Without `change` it is refused; nothing is
        written then, and on PostgreSQL the lock of the one manager is not taken.

        Raises:
            CatalogueDamaged: missing, or no catalogue. CatalogueTooNew, CatalogueTooOld. CatalogueForeign: of another
            store. RowTampered. CatalogueBusy: another manager has it. CatalogueUnreachable.

        """
        if isinstance(place, Path) and not place.exists():
            raise CatalogueDamaged(f"{place} is missing")
        database = Database(place)
        try:
            if change:
                database.claim()
            _bring_up_to_date(database, change=change)
            catalogue = cls(database, mac_key)
            catalogue._check_store(store)
            if check_rows:
                catalogue.check_rows()
        except BaseException:
            database.close()
            raise
        return catalogue

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_store(self, store: UUID | None) -> None:
        with self._database.read() as connection:
            theirs = connection.execute(sa.select(schema.about.c.store)).scalar_one()
        if store is not None and theirs is not None and theirs != store:
            raise CatalogueForeign(theirs, store)

    def take_possession(self, store: UUID) -> None:
        """Say whose catalogue it is, where schema 1 did not."""
        with self._database.change() as connection:
            connection.execute(schema.about.update().where(schema.about.c.store.is_(None)).values(store=store))

    def snapshot(self) -> bytes:
        """Return the bytes of a SQLite file with everything that is in the catalogue now, for a backup."""
        return snapshot_of(self._database)

    def compact(self) -> None:
        """Give room that removed rows took back to the file or the server. May run in another thread."""
        vacuum(self._database)

    @staticmethod
    def load(place: str, snapshot: Path) -> None:
        """Make a catalogue on PostgreSQL out of a snapshot; all of it, or nothing.

        Raises:
            NameTaken: one is there. CatalogueDamaged, CatalogueTooNew: the file is no catalogue of ours.

        """
        source = Database(snapshot)
        try:
            _bring_up_to_date(source, change=True)
            database = _made(place)
            try:
                fill_from_file(database, source)
            finally:
                database.close()
        finally:
            source.close()

    @staticmethod
    def whose(place: str) -> UUID | None:
        """Return the store of the catalogue on PostgreSQL, None where there is none. Raises CatalogueUnreachable."""
        database = Database(place)
        try:
            with database.read() as connection:
                wanted = {"name": POSTGRESQL_SCHEMA}
                if connection.execute(_SCHEMATA, wanted).scalar_one_or_none() is None:
                    return None
                store: UUID | None = connection.execute(sa.select(schema.about.c.store)).scalar_one()
                return store
        finally:
            database.close()

    @staticmethod
    def drop(place: str) -> None:
        """Take a catalogue on PostgreSQL away: what an interrupted `init` or `restore` has made."""
        database = Database(place)
        try:
            drop_tables(database)
        finally:
            database.close()

    @staticmethod
    def put_aside(place: str) -> str | None:
        """Rename the catalogue on PostgreSQL, whatever is in it; returns its new name, None where there is none."""
        database = Database(place)
        try:
            with database.change() as connection:
                names = set(connection.execute(sa.text("select nspname from pg_namespace")).scalars())
                if POSTGRESQL_SCHEMA not in names:
                    return None
                aside = next(
                    name for number in range(1, 1_000_000) if (name := f"{POSTGRESQL_SCHEMA}_old_{number}") not in names
                )
                connection.exec_driver_sql(f"alter schema {POSTGRESQL_SCHEMA} rename to {aside}")
                return aside
        finally:
            database.close()


_SCHEMATA = sa.text("select 1 from pg_namespace where nspname = :name")


def _made(place: Place) -> Database:
    """Return the database for a new catalogue; raises NameTaken where there is one."""
    if isinstance(place, Path):
        try:
            place.touch(mode=0o600, exist_ok=False)
        except FileExistsError as error:
            raise NameTaken(str(place)) from error
        return Database(place)
    database = Database(place)
    try:
        with database.read() as connection:
            if connection.execute(_SCHEMATA, {"name": POSTGRESQL_SCHEMA}).scalar_one_or_none() is not None:
                raise NameTaken(f"schema {POSTGRESQL_SCHEMA} of {shown(place)}")
    except BaseException:
        database.close()
        raise
    return database


def _bring_up_to_date(database: Database, *, change: bool) -> None:
    with database.read() as connection:
        version = connection.execute(sa.select(schema.about.c.schema)).scalar_one()
    if not isinstance(version, int):
        raise CatalogueDamaged("it does not say which schema it has")
    if version > SCHEMA:
        raise CatalogueTooNew(version, SCHEMA)
    if version == SCHEMA:
        return
    if not change:
        raise CatalogueTooOld(version, SCHEMA)
    from storage.catalogue_migrate import migrate  # noqa: PLC0415 - Alembic takes 30 ms and memory, once

    migrate(database, version)
