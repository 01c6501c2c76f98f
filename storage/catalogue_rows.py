"""What the catalogue's rows say; how they are kept is in `catalogue`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii
from typing import Any, Final, NamedTuple
from uuid import UUID

from storage.errors import RowTampered


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
    """Which guest a vTPM runs for, and how. `lease` grows with each start of an instance.

    `epoch` is the one that the vTPM's record in the store says (storage.store_records); 0 in rows of schema 1.
    `hw_pcrs`: the hardware PCRs that are put into the vTPM at its start, as "0,2,7"; empty for none.
    `hibernate_after`: seconds without a command, 0 for never, None for what the configuration says.
    `tcp_port`: the first of two ports on the loopback interface in place of Unix sockets, 0 for none.
    Quotas (commands and saves a second, bytes of NV) of 0 are none.

    Of the front end xen: `domain` names who may have it (a name, a UUID, or "any"), `xsm_label` the label it must have,
    `instance_domain` the domain that its instance lives in (empty: this one); `localities` that the guest may claim,
    bit 0 for locality 0; `trace`: its commands are noted; `bound_...` which domain had it last (None: none yet),
    `bound_since` in UTC, ISO 8601, `bound_boot` in which boot of our kernel; `ran_before`: whether that guest ran
    before it had this vTPM, None for not known. `measure` and `measured`: what the guest's boots are
    measured by, and what the present one was.
    """

    vtpm: UUID
    guest: str
    frontend: str
    owner: str
    mode: str
    startup: str
    lease: int
    created: str = ""
    epoch: int = 0
    hw_pcrs: str = ""
    tcp_port: int = 0
    hibernate_after: int | None = None
    commands_per_second: int = 0
    saves_per_second: int = 0
    nv_bytes: int = 0
    domain: str = ""
    xsm_label: str = ""
    instance_domain: str = ""
    localities: int = 1
    compat: bool = False
    maintenance: bool = False
    trace: bool = False
    bound_domain: int | None = None
    bound_uuid: str = ""
    bound_boot: str = ""
    bound_since: str = ""
    ran_before: bool | None = None
    measure: str = ""
    measured: str = ""


@dataclass(frozen=True, slots=True)
class GroupRow:
    """A group's name, and copies of what its record in the store says: PCRs, locality. Empty or None: not known."""

    uuid: UUID
    name: str
    pcrs: str = ""
    locality: int | None = None
    created: str = ""


@dataclass(frozen=True, slots=True)
class EventRow:
    """Something that happened."""

    time: str
    kind: str
    vtpm: UUID | None
    text: str


class Happened(NamedTuple):
    """What an event says of a change that is kept with it: `kind` is one word, `text` a sentence without a secret."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Audit:
    """Every row that carries a MAC: those that hold, and what is to be said of the others."""

    vtpms: list[VtpmRow]
    attachments: list[AttachmentRow]
    tampered: list[RowTampered]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which vTPMs a listing shows; None: all. `guest` also means that they are attached.

    `labels`: every one must be there, with this value, or with any (None).
    """

    group: UUID | None = None
    family: str | None = None
    guest: str | None = None
    labels: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Listed:
    """A vTPM as a listing shows it."""

    vtpm: VtpmRow
    attachment: AttachmentRow | None
    labels: Mapping[str, str] = field(default_factory=dict)


_YOUNGER: Final[dict[str, int | str | bool | None]] = {
    "epoch": 0,
    "hibernate_after": None,
    "commands_per_second": 0,
    "saves_per_second": 0,
    "nv_bytes": 0,
    "hw_pcrs": "",
    "tcp_port": 0,
    "domain": "",
    "xsm_label": "",
    "instance_domain": "",
    "localities": 1,
    "compat": False,
    "maintenance": False,
    "trace": False,
    "bound_domain": None,
    "bound_uuid": "",
    "bound_boot": "",
    "bound_since": "",
    "ran_before": None,
    "measure": "",
    "measured": "",
}  # what rows without them stand for


def canonical(table: str, values: Mapping[str, Any]) -> bytes:
    """Return what a row's MAC is over: table and row as JSON, keys sorted, UUIDs as text, no white space.

    An `epoch` of 0, a `hibernate_after` of None, quotas of 0 and what else `_YOUNGER` names are left out: rows of older
    schemas have none of it, and their MACs go on to hold.
    """
    parts = [
        f'"{name}":{_json(value)}'
        for name, value in sorted(values.items())
        if name not in _YOUNGER or value != _YOUNGER[name]
    ]  # 3 us a row, a third of what json.dumps takes
    return f'["{table}",{{{",".join(parts)}}}]'.encode()


def _json(value: Any) -> str:
    if type(value) is str:
        return encode_basestring_ascii(value)
    return f'"{value}"' if type(value) is UUID else json.dumps(value, default=str)
