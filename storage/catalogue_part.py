"""What every part of the catalogue works with: the database, and the MACs of rows."""

import hmac
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from storage import catalogue_schema as schema
from storage.catalogue_database import Database
from storage.catalogue_rows import AttachmentRow, Happened, VtpmRow, canonical
from storage.errors import RowTampered

ADD_EVENT = schema.events.insert()


def now() -> str:
    """Return the time of now, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Part:
    """An open catalogue's database and the key of its rows' MACs."""

    def __init__(self, database: Database, mac_key: bytes) -> None:
        """Work on `database`; `mac_key` has 32 bytes."""
        self._database, self._mac_key = database, mac_key

    def _mac(self, table: str, values: dict[str, Any]) -> bytes:
        return hmac.digest(self._mac_key, canonical(table, values), "sha256")

    def _sealed(self, table: str, row: VtpmRow | AttachmentRow) -> dict[str, Any]:
        """Return a row's values with its MAC."""
        values = {name: getattr(row, name) for name in row.__dataclass_fields__}  # plain values: asdict copies each
        return values | {"mac": self._mac(table, values)}

    def _authentic(self, table: str, values: dict[str, Any], what: str) -> dict[str, Any]:
        """Check a row's values against their MAC, which is taken out. Raises RowTampered."""
        mac = values.pop("mac")
        if not isinstance(mac, bytes) or not hmac.compare_digest(mac, self._mac(table, values)):
            raise RowTampered(table, what)
        return values

    def _vtpm(self, values: dict[str, Any]) -> VtpmRow:
        return VtpmRow(**self._authentic("vtpms", values, f"vTPM {values['name']}"))

    def _attachment(self, values: dict[str, Any]) -> AttachmentRow:
        what = f"vTPM {values['vtpm']} for guest {values['guest']}"
        return AttachmentRow(**self._authentic("attachments", values, what))

    @staticmethod
    def _note(connection: sa.Connection, vtpm: UUID | None, happened: Happened | None) -> None:
        """Keep an event in the transaction of what it tells of."""
        if happened is not None:
            row = {"time": now(), "kind": happened.kind, "vtpm": vtpm, "text": happened.text}
            connection.execute(ADD_EVENT, row)
