"""What an instance is started with, made from the manager's Spawn request by both keeper and spawner.

What lives here: the order and its checks. What must not: libtpms or anything else the keeper has no need of.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, Self
from uuid import UUID

from frontend_backend.messages_keeper import Spawn
from frontend_backend.tpmhdr import TpmFamily
from vtpm_instance import handover
from vtpm_instance.control import FrontEnd
from vtpm_instance.errors import BadRequestError, WrongDescriptorsError
from vtpm_instance.handover import Handed

# What the spawner is asked for an instance by, and its answer: the process id, or 0 and then a text in UTF-8. No
# messages of the protocol with the manager: making one writes to pages that the spawner shares with its children.
WANTED: Final = b"\1"
WANTED_NOW: Final = b"\2"  # its order waits already
STARTED: Final = struct.Struct("=I")
LISTENERS: Final = ("data", "control", "ring", "proxy")
_FAMILIES: Final = tuple(TpmFamily)
_FRONT_ENDS: Final = tuple(FrontEnd)
_BEFORE_LISTENERS: Final = 3  # ring page, instance's doorbell, state image
_NO_ID: Final = (1 << 32) - 1  # "leave it as it is" to setresuid(2): never a user
_UUID_BYTES: Final = 16
ALL_LOCALITIES: Final = 0b11111  # bit 0 for locality 0


@dataclass(slots=True)
class InstanceOrder:
    """Everything an instance is handed. Descriptors belong to the instance; `listeners` by name.

    Names are "data", "control", "ring" and "proxy" (no socket, but the server's end of a device); the rest is said in
    Spawn. `uid` and `gid` 0 keep those of the keeper. Not frozen: that would touch a
    page for each field in each instance.
    """

    vtpm: UUID
    lease: int
    family: TpmFamily
    front_end: FrontEnd
    owner_uid: int
    manager_uid: int
    page: int
    doorbell: int
    image: int
    listeners: Mapping[str, int]
    uid: int = 0
    gid: int = 0
    connections: list[Handed] = field(default_factory=list)
    commands_per_second: int = 0
    saves_per_second: int = 0
    nv_bytes: int = 0
    localities: int = 1
    maintenance: bool = False
    trace: bool = False

    CODEC: ClassVar[struct.Struct] = struct.Struct("=16sQIIIIBBBIIIB??")  # then the connections (handover)

    def pack(self) -> bytes:
        """Return what the spawner is sent, beside `descriptors`. Keeper and spawner are always of one version."""
        listeners = sum(1 << LISTENERS.index(name) for name in self.listeners)
        return (
            self.CODEC.pack(
                self.vtpm.bytes,
                self.lease,
                self.owner_uid,
                self.manager_uid,
                self.uid,
                self.gid,
                _FAMILIES.index(self.family),
                _FRONT_ENDS.index(self.front_end),
                listeners,
                self.commands_per_second,
                self.saves_per_second,
                self.nv_bytes,
                self.localities,
                self.maintenance,
                self.trace,
            )
            + handover.pack(self.connections)[0]
        )

    @classmethod
    def unpack(cls, data: bytes, descriptors: list[int]) -> Self:
        """Return the order that `pack` made of a checked one.

        Raises:
            struct.error, ValueError, BadRequestError: it is none.

        """
        vtpm, lease, owner_uid, manager_uid, uid, gid, family, front_end, mask, *rest = cls.CODEC.unpack_from(data)
        page, doorbell, image, *handed = descriptors
        names = [name for bit, name in enumerate(LISTENERS) if mask >> bit & 1]
        connections = handover.unpack(data[cls.CODEC.size :], handed[len(names) :])
        return cls(
            UUID(bytes=vtpm),
            lease,
            _FAMILIES[family],
            _FRONT_ENDS[front_end],
            owner_uid,
            manager_uid,
            page,
            doorbell,
            image,
            dict(zip(names, handed[: len(names)], strict=True)),
            uid,
            gid,
            connections,
            *rest,
        )

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All descriptors of the order, listeners in the order of LISTENERS, then those of the connections."""
        connected = handover.pack(self.connections)[1]
        return (self.page, self.doorbell, self.image, *self.listeners.values(), *connected)


def uuid_of(raw: bytes) -> UUID:
    """Return the UUID in a message.

    Raises:
        BadRequestError: not 16 bytes.

    """
    if len(raw) != _UUID_BYTES:
        raise BadRequestError(f"a UUID has {_UUID_BYTES} bytes, not {len(raw)}")
    return UUID(bytes=raw)


def named_listeners(names: Sequence[str], descriptors: list[int]) -> dict[str, int]:
    """Return listening sockets by name, in the order of LISTENERS.

    Raises:
        WrongDescriptorsError, BadRequestError: descriptors and names do not fit, or are none.

    """
    if len(descriptors) != len(names):
        raise WrongDescriptorsError(len(names), len(descriptors))
    if len(set(names)) != len(names) or not set(LISTENERS).issuperset(names):
        raise BadRequestError(f"listeners are of {sorted(LISTENERS)}, each once, not {list(names)}")
    named = dict(zip(names, descriptors, strict=True))
    return {name: named[name] for name in LISTENERS if name in named}


def order_of(request: Spawn, descriptors: list[int]) -> InstanceOrder:
    """Return the order that a request with its descriptors (page, doorbell, image, listeners) makes, checked.

    Raises:
        WrongDescriptorsError, BadRequestError: it makes none.

    """
    if len(descriptors) < _BEFORE_LISTENERS:
        raise WrongDescriptorsError(_BEFORE_LISTENERS + len(request.listeners), len(descriptors))
    page, doorbell, image, *listeners = descriptors
    named = named_listeners(request.listeners, listeners)
    if not all(0 <= number < _NO_ID for number in (request.uid, request.gid)):
        raise BadRequestError(f"user {request.uid} and group {request.gid} are no identities")
    quotas = (request.commands_per_second, request.saves_per_second, request.nv_bytes)
    if not all(0 <= quota < _NO_ID for quota in quotas):
        raise BadRequestError(f"{quotas} are no quotas")
    if not 0 < request.localities <= ALL_LOCALITIES:
        raise BadRequestError(f"{request.localities:#x} is no map of localities 0 to 4")
    try:
        family, front_end = TpmFamily(request.family), FrontEnd(request.frontend)
    except ValueError as error:
        raise BadRequestError(str(error)) from error
    return InstanceOrder(
        vtpm=uuid_of(request.vtpm),
        lease=request.lease,
        family=family,
        front_end=front_end,
        owner_uid=request.owner_uid,
        manager_uid=request.manager_uid,
        page=page,
        doorbell=doorbell,
        image=image,
        listeners=named,
        uid=request.uid,
        gid=request.gid,
        commands_per_second=request.commands_per_second,
        saves_per_second=request.saves_per_second,
        nv_bytes=request.nv_bytes,
        localities=request.localities,
        maintenance=request.maintenance,
        trace=request.trace,
    )
