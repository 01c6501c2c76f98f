"""What two managers say over mutual TLS when a vTPM moves: one request and one answer a connection.

The destination asks (Claim, then Confirm); where the source's operator wants a vTPM back, the source does (Renounce).
A message is preceded by its length, four bytes, big-endian. Who asks is decided by the pinned certificate of the
connection, never by what a message says.
"""

import struct
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from frontend_backend.errors import MessageError
from frontend_backend.messages import Protocol

VERSION: Final = 1
MAX_MESSAGE: Final = 4096  # bytes: a state blob's header has some hundred, everything else is smaller
LENGTH: Final = struct.Struct(">I")
ID_SIZE: Final = 16  # bytes of a UUID, an export's id, a claim's id
KEY_SIZE: Final = 32  # bytes of an export's key


class MigrationRefusal(StrEnum):
    """Why the other manager did not do it."""

    MALFORMED = "malformed"
    DENIED = "denied"  # not authorised, or not for this vTPM; which of both is not told
    STALE = "stale"  # the vTPM was used after this state was taken out
    TAKEN = "taken"  # frozen for another claim
    BUSY = "busy"  # not now; the same may be asked again
    RECLAIMED = "reclaimed"  # an operator took it back, or it never left for this claim
    HAS_IT = "has-it"  # it has the state, or had it: it cannot promise that nobody runs it
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Claim:
    """Ask for the key of a state blob, and with it for the vTPM.

    `header` is the blob's as it is; `claim` names this claim, 16 random bytes: only who repeats it is answered again.
    """

    vtpm: bytes
    header: bytes
    claim: bytes


@dataclass(frozen=True, slots=True)
class ClaimReply:
    """The vTPM is frozen here, durably, and the key of the export is yours; it has 32 bytes."""

    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Confirm:
    """The vTPM's state is durable here: remove yours."""

    vtpm: bytes
    export: bytes
    claim: bytes


@dataclass(frozen=True, slots=True)
class ConfirmReply:
    """It is removed; the same answer to who asks again."""


@dataclass(frozen=True, slots=True)
class Renounce:
    """Ask the destination to give a claimed vTPM up for good, which has not committed its state."""

    vtpm: bytes
    export: bytes


@dataclass(frozen=True, slots=True)
class RenounceReply:
    """It does not have it, and forgot what it had of it."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was done."""

    code: MigrationRefusal
    text: str


MigrationRequest = Claim | Confirm | Renounce
MigrationReply = ClaimReply | ConfirmReply | RenounceReply | Refused

_REQUESTS = Protocol(VERSION, (Claim, Confirm, Renounce))
_REPLIES = Protocol(VERSION, (ClaimReply, ConfirmReply, RenounceReply, Refused))


def encode_migration_request(message: MigrationRequest) -> bytes:
    """Return a request with its length before it."""
    return _framed(_REQUESTS.encode(message))


def encode_migration_reply(message: MigrationReply) -> bytes:
    """Return an answer with its length before it."""
    return _framed(_REPLIES.encode(message))


def _framed(body: bytes) -> bytes:
    if len(body) > MAX_MESSAGE:
        raise MessageError(f"a message between managers has at most {MAX_MESSAGE} bytes, not {len(body)}")
    return LENGTH.pack(len(body)) + body


def body_size(untrusted: bytes) -> int:
    """Return how many bytes follow a length. Raises MessageError: more than a message has, or none."""
    (size,) = LENGTH.unpack(untrusted)
    if not 0 < size <= MAX_MESSAGE:
        raise MessageError(f"a message between managers has 1 to {MAX_MESSAGE} bytes, not {size}")
    return int(size)


def decode_migration_request(untrusted: bytes) -> MigrationRequest:
    """Return the request in a body; its ids have the sizes that they must have.

    Raises:
        MessageError: it is none.

    """
    message: MigrationRequest = _REQUESTS.decode(untrusted)
    ids = [message.vtpm]
    ids += [] if isinstance(message, Claim) else [message.export]
    ids += [] if isinstance(message, Renounce) else [message.claim]
    if any(len(each) != ID_SIZE for each in ids):
        raise MessageError(f"ids have {ID_SIZE} bytes")
    return message


def decode_migration_reply(untrusted: bytes) -> MigrationReply:
    """Return the answer in a body. Raises MessageError: it is none."""
    message: MigrationReply = _REPLIES.decode(untrusted)
    if isinstance(message, ClaimReply) and len(message.key) != KEY_SIZE:
        raise MessageError(f"a key has {KEY_SIZE} bytes")
    return message
