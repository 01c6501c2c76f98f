"""The catalogue's attachments, and listings of vTPMs with them."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa

from storage import catalogue_schema as schema
from storage.catalogue_part import Part, now
from storage.catalogue_rows import AttachmentRow, Audit, Filter, Happened, Listed, VtpmRow
from storage.errors import NameTaken, NoSuchRow, RowTampered

# made once: SQLAlchemy takes longer to make a statement, and to see that it knows it, than SQLite to do it
_BY_VTPM = sa.select(schema.attachments).where(schema.attachments.c.vtpm == sa.bindparam("wanted"))
_LABELS = (
    sa.select(schema.labels.c.key, schema.labels.c.value)
    .where(schema.labels.c.vtpm == sa.bindparam("wanted"))
    .order_by(schema.labels.c.key)
)
_ADD = schema.attachments.insert()
_REMOVE = schema.attachments.delete().where(schema.attachments.c.vtpm == sa.bindparam("wanted"))
_VTPM: Final = tuple(column.name for column in schema.vtpms.c)
_ATTACHMENT: Final = tuple(column.name for column in schema.attachments.c)  # `vtpm` first
_LISTING = (
    sa.select(*schema.vtpms.c, *(column.label(f"a_{column.name}") for column in schema.attachments.c))
    .select_from(schema.vtpms.outerjoin(schema.attachments, schema.attachments.c.vtpm == schema.vtpms.c.uuid))
    .order_by(schema.vtpms.c.name)
)
_BOTH = _LISTING.where(schema.vtpms.c.uuid == sa.bindparam("wanted"))


class Attachments(Part):
    """Attachments, labels and listings."""

    def find_attachment(self, vtpm: UUID) -> AttachmentRow | None:
        """Return a vTPM's attachment, None where it has none. Raises RowTampered."""
        with self._database.read() as connection:
            row = connection.execute(_BY_VTPM, {"wanted": vtpm}).mappings().one_or_none()
            return None if row is None else self._attachment(dict(row))

    def find_attached(self, vtpm: UUID) -> tuple[VtpmRow, AttachmentRow] | None:
        """Return a vTPM's row and its attachment, None where either is missing. Raises RowTampered."""
        with self._database.read() as connection:
            row = connection.execute(_BOTH, {"wanted": vtpm}).one_or_none()
            if row is None:
                return None
            found = self._joined(row)
            return None if found.attachment is None else (found.vtpm, found.attachment)

    def find_attachment_at_ports(self, first: int, count: int) -> AttachmentRow | None:
        """Return an attachment that has one of `count` TCP ports from `first` on, None for none. Raises RowTampered.

        Each attachment with a port has `count` of them, from `tcp_port` on.
        """
        column = schema.attachments.c.tcp_port
        query = sa.select(schema.attachments).where(column > max(first - count, 0), column < first + count).limit(1)
        with self._database.read() as connection:
            row = connection.execute(query).mappings().first()
            return None if row is None else self._attachment(dict(row))

    def attachments(self) -> list[AttachmentRow]:
        """Return every attachment. Raises RowTampered."""
        return list(self.each_attachment())

    def each_attachment(self) -> Generator[AttachmentRow]:
        """Yield every attachment without having all in memory. Raises RowTampered."""
        with closing(self._database.each(sa.select(schema.attachments))) as rows:
            for row in rows:
                yield self._attachment(row)

    def attach(self, row: AttachmentRow, happened: Happened | None = None) -> AttachmentRow:
        """Add an attachment and return its row with `created` filled in. Raises NameTaken when the vTPM has one."""
        row = replace(row, created=row.created or now())
        with self._database.change() as connection:
            try:
                connection.execute(_ADD, self._sealed("attachments", row))
            except sa.exc.IntegrityError as error:
                raise NameTaken(f"an attachment of {row.vtpm}") from error
            self._note(connection, row.vtpm, happened)
        return row

    def renew(self, row: AttachmentRow) -> None:
        """Replace a vTPM's attachment. Raises NoSuchRow."""
        update = schema.attachments.update().where(schema.attachments.c.vtpm == row.vtpm)
        with self._database.change() as connection:
            if connection.execute(update.values(self._sealed("attachments", row))).rowcount != 1:
                raise NoSuchRow(f"an attachment of vTPM {row.vtpm}")

    def detach(self, vtpm: UUID, happened: Happened | None = None) -> None:
        """Remove a vTPM's attachment. Raises NoSuchRow."""
        with self._database.change() as connection:
            if connection.execute(_REMOVE, {"wanted": vtpm}).rowcount != 1:
                raise NoSuchRow(f"an attachment of vTPM {vtpm}")
            self._note(connection, vtpm, happened)

    # --- all of it ---------------------------------------------------------------------------------

    def audit(self) -> Audit:
        """Read every row that carries a MAC, and say which of them fail it. May run in another thread."""
        found = Audit([], [], [])
        for row in self._database.each(sa.select(schema.vtpms)):
            with _collected(found.tampered):
                found.vtpms.append(self._vtpm(row))
        for row in self._database.each(sa.select(schema.attachments)):
            with _collected(found.tampered):
                found.attachments.append(self._attachment(row))
        return found

    def check_rows(self) -> None:
        """Check every row that carries a MAC, one after the other. Raises RowTampered."""
        for table in (schema.vtpms, schema.attachments):
            with closing(self._database.each(sa.select(table))) as rows:
                for row in rows:
                    self._authentic(table.name, row, _named(table.name, row))

    def listing(self, only: Filter, after: str, limit: int) -> list[Listed]:
        """Return at most `limit` vTPMs by name, from behind the name `after`, with attachments and labels.

        Raises:
            RowTampered: a row that is read fails its MAC.

        """
        query = _LISTING.where(schema.vtpms.c.name > after).limit(limit)
        for column, wanted in (
            (schema.vtpms.c.group, only.group),
            (schema.vtpms.c.family, only.family),
            (schema.attachments.c.guest, only.guest),
        ):
            if wanted is not None:
                query = query.where(column == wanted)
        for key, value in only.labels:
            query = query.where(_labelled(key, value))
        with self._database.read() as connection:
            rows = [self._joined(row) for row in connection.execute(query)]
            labels = _labels_of(connection, [row.vtpm.uuid for row in rows])
        return [replace(row, labels=labels.get(row.vtpm.uuid, {})) for row in rows]

    def _joined(self, row: Sequence[Any]) -> Listed:
        vtpm = self._vtpm(dict(zip(_VTPM, row, strict=False)))
        its = row[len(_VTPM) :]
        return Listed(vtpm, None if its[0] is None else self._attachment(dict(zip(_ATTACHMENT, its, strict=True))))

    # --- labels ------------------------------------------------------------------------------------

    def labels(self, vtpm: UUID) -> dict[str, str]:
        """Return a vTPM's labels, sorted by key. They carry no MAC: nothing is decided by them."""
        with self._database.read() as connection:
            return {row.key: row.value for row in connection.execute(_LABELS, {"wanted": vtpm})}

    def change_labels(
        self, vtpm: UUID, put: Mapping[str, str], remove: Sequence[str], happened: Happened | None = None
    ) -> None:
        """Put labels on a vTPM, replacing those of the same key, and remove others; a missing one is no error."""
        mine = schema.labels.c.vtpm == vtpm
        gone = [*put, *remove]
        rows = [{"vtpm": vtpm, "key": key, "value": value} for key, value in put.items()]
        with self._database.change() as connection:
            connection.execute(schema.labels.delete().where(mine, schema.labels.c.key.in_(gone)))
            if rows:
                connection.execute(schema.labels.insert(), rows)
            self._note(connection, vtpm, happened)


def _labelled(key: str, value: str | None) -> sa.ColumnElement[bool]:
    found = sa.select(schema.labels.c.vtpm).where(
        schema.labels.c.vtpm == schema.vtpms.c.uuid, schema.labels.c.key == key
    )
    return sa.exists(found if value is None else found.where(schema.labels.c.value == value))


def _labels_of(connection: sa.Connection, vtpms: Sequence[UUID]) -> dict[UUID, dict[str, str]]:
    query = sa.select(schema.labels).where(schema.labels.c.vtpm.in_(vtpms)).order_by(schema.labels.c.key)
    found: dict[UUID, dict[str, str]] = {}
    for vtpm, key, value in connection.execute(query):
        found.setdefault(vtpm, {})[key] = value
    return found


def _named(table: str, values: Mapping[str, Any]) -> str:
    if table == "vtpms":
        return f"vTPM {values['name']}"
    return f"vTPM {values['vtpm']} for guest {values['guest']}"


@contextmanager
def _collected(tampered: list[RowTampered]) -> Iterator[None]:
    try:
        yield
    except RowTampered as error:
        tampered.append(error)
