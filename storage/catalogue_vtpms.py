"""The catalogue's vTPMs and groups: find, add, remove."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa

from storage import catalogue_schema as schema
from storage.catalogue_part import Part, now
from storage.catalogue_rows import GroupRow, Happened, VtpmRow
from storage.errors import NameTaken, NoSuchRow

_BY_UUID = sa.select(schema.vtpms).where(schema.vtpms.c.uuid == sa.bindparam("wanted"))
_BY_NAME = sa.select(schema.vtpms).where(schema.vtpms.c.name == sa.bindparam("wanted"))
_BY_IMAGE = sa.select(schema.vtpms).where(schema.vtpms.c.state_image == sa.bindparam("wanted"))


class Vtpms(Part):
    """vTPMs and groups."""

    _groups: list[GroupRow] | None = None  # read once: this manager is the only one that changes them

    def find_vtpm(self, uuid: UUID) -> VtpmRow | None:
        """Return a vTPM's row, None where there is none. Raises RowTampered."""
        return self._one(_BY_UUID, uuid)

    def find_vtpm_by_name(self, name: str) -> VtpmRow | None:
        """Return the row of the vTPM with this name, None where there is none. Raises RowTampered."""
        return self._one(_BY_NAME, name)

    def find_vtpm_by_image(self, state_image: str) -> VtpmRow | None:
        """Return the row of a vTPM whose state image was named so, None where there is none. Raises RowTampered."""
        return self._one(_BY_IMAGE.limit(1), state_image)

    def vtpms(self) -> list[VtpmRow]:
        """Return every vTPM. Raises RowTampered."""
        return list(self.each_vtpm())

    def each_vtpm(self) -> Generator[VtpmRow]:
        """Yield every vTPM, by name, without having all in memory. Raises RowTampered."""
        with closing(self._database.each(sa.select(schema.vtpms).order_by(schema.vtpms.c.name))) as rows:
            for row in rows:
                yield self._vtpm(row)

    def count_vtpms(self, group: UUID | None = None) -> int:
        """Return how many there are, or how many of them are of a group."""
        query = sa.select(sa.func.count()).select_from(schema.vtpms)
        if group is not None:
            query = query.where(schema.vtpms.c.group == group)
        with self._database.read() as connection:
            return connection.execute(query).scalar_one()

    def add_vtpm(
        self, row: VtpmRow, happened: Happened | None = None, labels: Mapping[str, str] | None = None
    ) -> VtpmRow:
        """Add a vTPM and return its row with `created` filled in. Raises NameTaken."""
        row = replace(row, created=row.created or now())
        with self._database.change() as connection:
            try:
                connection.execute(schema.vtpms.insert(), self._sealed("vtpms", row))
            except sa.exc.IntegrityError as error:
                raise NameTaken(f"vTPM {row.name}") from error
            if labels:
                connection.execute(schema.labels.insert(), _label_rows([row], labels))
            self._note(connection, row.uuid, happened)
        return row

    def add_vtpms(
        self, rows: Sequence[VtpmRow], kind: str, text: str, labels: Mapping[str, str] | None = None
    ) -> list[VtpmRow]:
        """Add vTPMs, each with an event of this kind and text after its name; all of them, or none.

        Returns the rows with `created` filled in. Raises NameTaken.
        """
        time = now()
        rows = [replace(row, created=row.created or time) for row in rows]
        events = [{"time": time, "kind": kind, "vtpm": row.uuid, "text": f"{row.name}{text}"} for row in rows]
        if not rows:
            return rows
        with self._database.change() as connection:
            try:
                connection.execute(schema.vtpms.insert(), [self._sealed("vtpms", row) for row in rows])
            except sa.exc.IntegrityError as error:
                raise NameTaken("one of these names or UUIDs") from error
            if labels:
                connection.execute(schema.labels.insert(), _label_rows(rows, labels))
            connection.execute(schema.events.insert(), events)
        return rows

    def names_taken(self, names: Sequence[str]) -> set[str]:
        """Return those of `names` that are in use, unchecked."""
        taken: set[str] = set()
        with self._database.read() as connection:
            for start in range(0, len(names), _NAMES_AT_ONCE):
                some = names[start : start + _NAMES_AT_ONCE]
                found = connection.execute(sa.select(schema.vtpms.c.name).where(schema.vtpms.c.name.in_(some)))
                taken.update(found.scalars())
        return taken

    def remove_vtpm(self, uuid: UUID, happened: Happened | None = None) -> None:
        """Remove a vTPM's row and labels. Raises NoSuchRow."""
        with self._database.change() as connection:
            if connection.execute(schema.vtpms.delete().where(schema.vtpms.c.uuid == uuid)).rowcount != 1:
                raise NoSuchRow(f"vTPM {uuid}")
            self._note(connection, uuid, happened)

    def groups(self) -> list[GroupRow]:
        """Return every group."""
        if self._groups is None:
            with self._database.read() as connection:
                rows = connection.execute(sa.select(schema.groups)).mappings()
                self._groups = [GroupRow(**row) for row in rows]
        return list(self._groups)

    def find_group_by_name(self, name: str) -> GroupRow | None:
        """Return the group with this name, None where there is none."""
        return next((row for row in self.groups() if row.name == name), None)

    def add_group(self, row: GroupRow, happened: Happened | None = None) -> None:
        """Add a group. Raises NameTaken."""
        self._groups = None
        with self._database.change() as connection:
            try:
                connection.execute(schema.groups.insert(), asdict(row))
            except sa.exc.IntegrityError as error:
                raise NameTaken(f"group {row.name}") from error
            self._note(connection, None, happened)

    def remove_group(self, uuid: UUID, happened: Happened | None = None) -> None:
        """Remove a group's row. Raises NoSuchRow."""
        self._groups = None
        with self._database.change() as connection:
            if connection.execute(schema.groups.delete().where(schema.groups.c.uuid == uuid)).rowcount != 1:
                raise NoSuchRow(f"group {uuid}")
            self._note(connection, None, happened)

    def change_group(self, row: GroupRow, happened: Happened | None = None) -> None:
        """Replace what a group's row says beside its UUID. Raises NoSuchRow, NameTaken."""
        self._groups = None
        with self._database.change() as connection:
            update = schema.groups.update().where(schema.groups.c.uuid == row.uuid).values(asdict(row))
            try:
                changed = connection.execute(update).rowcount
            except sa.exc.IntegrityError as error:
                raise NameTaken(f"group {row.name}") from error
            if changed != 1:
                raise NoSuchRow(f"group {row.uuid}")
            self._note(connection, None, happened)

    def _one(self, query: sa.Select[Any], wanted: UUID | str) -> VtpmRow | None:
        with self._database.read() as connection:
            row = connection.execute(query, {"wanted": wanted}).mappings().one_or_none()
            return None if row is None else self._vtpm(dict(row))


_NAMES_AT_ONCE: Final = 500  # parameters of one statement


def _label_rows(rows: Sequence[VtpmRow], labels: Mapping[str, str]) -> list[dict[str, object]]:
    return [{"vtpm": row.uuid, "key": key, "value": value} for row in rows for key, value in labels.items()]
