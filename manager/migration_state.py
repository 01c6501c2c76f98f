"""What a manager keeps about migration: its identity, its peers, what left, what is to come. Pure.

All of it is one document, sealed under the store key, whose digest the store keeps (`migration_box`): an old copy of it
is no more accepted than an old store.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final, Self, TypeVar
from uuid import UUID

from manager.errors import IntegrityError

_VERSION: Final = 1
NOBODY: Final = "-"  # the peer of what perhaps left, before the store was put back to an earlier time


@dataclass(frozen=True, slots=True)
class Identity:
    """This manager's key pair (PKCS #8, DER) and self-signed certificate (PEM)."""

    key: bytes = field(repr=False)
    certificate: str


@dataclass(frozen=True, slots=True)
class Peer:
    """Another manager, and what may move. Times are whole seconds since 1970; `by` is the user who said so.

    Vtpms in `leave_vtpms` or in `leave_groups` may be claimed by it; vTPMs in `come_vtpms`, or put into one of
    `come_groups`, may be claimed from it. `address` is empty for one that is never called.
    """

    name: str
    certificate: str
    fingerprint: str
    address: str = ""
    leave_vtpms: tuple[UUID, ...] = ()
    leave_groups: tuple[UUID, ...] = ()
    come_vtpms: tuple[UUID, ...] = ()
    come_groups: tuple[UUID, ...] = ()
    until: int = 0
    made: int = 0
    by: int = 0

    def may_take(self, vtpm: UUID, group: UUID, now: float) -> bool:
        """Tell whether this vTPM may leave to it now."""
        return now < self.until and (vtpm in self.leave_vtpms or group in self.leave_groups)

    def may_bring(self, vtpm: UUID, group: UUID, now: float) -> bool:
        """Tell whether this vTPM may come from it into this group now."""
        return now < self.until and (vtpm in self.come_vtpms or group in self.come_groups)


@dataclass(frozen=True, slots=True)
class Departure:
    """A vTPM that was claimed: by whom, which export (16 bytes, hex), by which claim. `done`: when it was removed."""

    vtpm: UUID
    peer: str
    fingerprint: str
    export: str
    claim: str
    generation: int
    since: int
    done: int = 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A vTPM that is to come from a peer; `export` and `claim` (hex) once it was claimed."""

    vtpm: UUID
    peer: str
    fingerprint: str
    since: int
    export: str = ""
    claim: str = ""


_LISTS: Final = ("peers", "departures", "arrivals")


@dataclass(frozen=True, slots=True)
class MigrationState:
    """The document. Peers by name, departures and arrivals by vTPM.

    `doubtful`: groups that were closed when the store was put back to an earlier time, or on another TPM: what may have
    left of them is to be frozen once they are open. `claimants`: the peers as they were then, whatever is said since.
    """

    identity: Identity | None = None
    peers: Mapping[str, Peer] = field(default_factory=dict)
    departures: Mapping[UUID, Departure] = field(default_factory=dict)
    arrivals: Mapping[UUID, Arrival] = field(default_factory=dict)
    doubtful: tuple[UUID, ...] = ()
    claimants: tuple[Peer, ...] = ()

    def with_peer(self, peer: Peer) -> Self:
        """Return the state with a peer added or replaced."""
        return replace(self, peers={**self.peers, peer.name: peer})

    def without_peer(self, name: str) -> Self:
        """Return the state without a peer."""
        return replace(self, peers={other: peer for other, peer in self.peers.items() if other != name})

    def with_departure(self, departure: Departure) -> Self:
        """Return the state with a departure added or replaced."""
        return replace(self, departures={**self.departures, departure.vtpm: departure})

    def without_departure(self, vtpm: UUID) -> Self:
        """Return the state without a departure."""
        return replace(self, departures={uuid: kept for uuid, kept in self.departures.items() if uuid != vtpm})

    def with_arrival(self, arrival: Arrival) -> Self:
        """Return the state with an arrival added or replaced."""
        return replace(self, arrivals={**self.arrivals, arrival.vtpm: arrival})

    def without_arrival(self, vtpm: UUID) -> Self:
        """Return the state without an arrival."""
        return replace(self, arrivals={uuid: kept for uuid, kept in self.arrivals.items() if uuid != vtpm})

    def by_fingerprint(self, fingerprint: str) -> Peer | None:
        """Return the peer whose certificate has this fingerprint."""
        return next((peer for peer in self.peers.values() if peer.fingerprint == fingerprint), None)

    def pack(self) -> bytes:
        """Return its bytes, JSON."""
        identity = self.identity
        document: dict[str, Any] = {
            "version": _VERSION,
            "identity": None if identity is None else [identity.key.hex(), identity.certificate],
        }
        if self.doubtful:
            document["doubtful"] = [str(group) for group in self.doubtful]
            document["claimants"] = [asdict(peer) for peer in self.claimants]
        for name in _LISTS:
            document[name] = [asdict(item) for item in getattr(self, name).values()]
        return json.dumps(document, separators=(",", ":"), default=str).encode()

    @classmethod
    def unpack(cls, content: bytes) -> Self:
        """Read what `pack` wrote. Raises IntegrityError: it is something else."""
        try:
            document = json.loads(content)
            if document["version"] != _VERSION:
                raise IntegrityError("the data about migration is of a newer version: use the manager that wrote it")
            made = document["identity"]
            identity = None if made is None else Identity(bytes.fromhex(made[0]), str(made[1]))
            peers = [_made(Peer, item) for item in document["peers"]]
            departures = [_made(Departure, item) for item in document["departures"]]
            arrivals = [_made(Arrival, item) for item in document["arrivals"]]
            doubtful = tuple(UUID(group) for group in document.get("doubtful", []))
            claimants = tuple(_made(Peer, item) for item in document.get("claimants", []))
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"the manager's data about migration cannot be read: {error}") from error
        return cls(
            identity,
            {peer.name: peer for peer in peers},
            {departure.vtpm: departure for departure in departures},
            {arrival.vtpm: arrival for arrival in arrivals},
            doubtful,
            claimants,
        )


_Item = TypeVar("_Item", Peer, Departure, Arrival)


def _made(kind: type[_Item], item: dict[str, Any]) -> _Item:
    values = {known.name: _value(item[known.name], str(known.type)) for known in fields(kind) if known.name in item}
    return kind(**values)


def _value(value: Any, kind: str) -> Any:
    if "tuple" in kind:
        return tuple(UUID(text) for text in value)
    if "UUID" in kind:
        return UUID(value)
    wanted = int if "int" in kind else str
    if type(value) is not wanted:
        raise TypeError(f"{value!r} where {wanted.__name__} is due")
    return value
