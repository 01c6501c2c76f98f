"""What a Xen back end is told about a device: which vTPM it may have, on what terms, and by whom (Protocols, no I/O).

`vtpm-xen` asks the manager, `vtpm-xen-instance` knows the one instance of its domain: each brings a Binder.
"""

import re
from dataclasses import dataclass
from typing import Final, Protocol

from frontend_backend.local import LocalRing
from frontend_backend.tpmhdr import TpmFamily
from frontend_backend.xen_kernel import DomainId

MOST_LOCALITIES: Final = 5  # 0 to 4 (TPM 2.0 Part 1, locality)
_UUID: Final = re.compile(rb"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device stands in xenstore: the back end's domain, the front end's, and the device's number there."""

    own: DomainId
    domain: DomainId
    device: int

    @property
    def root(self) -> str:
        """Return the node above all vTPM devices of the back end's domain."""
        return f"/local/domain/{self.own}/backend/vtpm"

    @property
    def path(self) -> str:
        """Return the back end's node."""
        return f"{self.root}/{self.domain}/{self.device}"

    @property
    def front(self) -> str:
        """Return the front end's node: where the toolstack makes it, and nowhere else."""
        return f"/local/domain/{self.domain}/device/vtpm/{self.device}"

    def __str__(self) -> str:
        return f"{self.domain}/{self.device}"


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a domain has its vTPM.

    `compat`: the driver's TPM 1.2 probes are answered for a TPM 2.0. `localities`: those it may claim, bit 0 for
    locality 0. `extra_pages`: how many more than one a request may have. `wishes`: what crosses is the manager's
    protocol, in which a ring without an answer says something; it is not looked into.
    """

    family: TpmFamily = TpmFamily.TPM_2_0
    compat: bool = False
    localities: int = 1
    extra_pages: int = 0
    wishes: bool = False

    def allows(self, locality: int) -> bool:
        """Tell whether the front end may claim `locality` (0 to 255)."""
        return locality < MOST_LOCALITIES and bool(self.localities >> locality & 1)


class BindRefusedError(Exception):
    """The domain may not have this vTPM. `again`: seconds after which it is worth asking again."""

    def __init__(self, text: str, again: float) -> None:
        super().__init__(text)
        self.again = again


class BindingEndedError(Exception):
    """The binding is over: it must be asked for anew."""


class Granted(Protocol):
    """A binding that stands until `close`, or until whoever granted it ends it."""

    @property
    def terms(self) -> Terms:
        """On what terms."""
        ...

    async def ring(self) -> LocalRing:
        """Return a new ring, the submitting end, which becomes the caller's; waits while there is none.

        Raises:
            BindingEndedError: there will be none any more.

        """
        ...

    async def ended(self) -> None:
        """Return once the binding is over. Rings stay as they are until their own ends."""
        ...

    def close(self) -> None:
        """End the binding. May be called twice."""
        ...


class Binder(Protocol):
    """Who decides."""

    async def meet(self, place: Place) -> None:
        """Note what can be known only now: the toolstack holds the guest until our state says that we are there."""
        ...

    def part(self, place: Place) -> None:
        """Note that the device goes, or its domain; never called where this process ends."""
        ...

    async def bind(self, place: Place, uuid: bytes) -> Granted:
        """Ask whether the domain at `place` may have the vTPM with this UUID (16 bytes); waits as long as it takes.

        Raises:
            BindRefusedError: it may not.

        """
        ...


def parse_uuid(untrusted_value: bytes | None) -> bytes | None:
    """Return the 16 bytes of a UUID as toolstacks write it (36 characters), None if it is none."""
    if untrusted_value is None or not _UUID.fullmatch(untrusted_value):
        return None
    return bytes.fromhex(untrusted_value.decode().replace("-", ""))
