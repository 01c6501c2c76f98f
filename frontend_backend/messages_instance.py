"""What an instance and the manager say over their ring.

The instance asks, the manager answers: load, commit, random / PCR read, quote, export / import of state blobs, and a
report of the instance's own state, which carries no authority. Orders travel as flags in every answer; a doorbell
without an answer means "ask me", and the instance then sends a report. A message is a TPM-style packet: the 10-byte
header with Xen's vTPM tag (0x01C1 requests, 0x01C4 answers; reference: vtpmmgr/tcg.h), the size, a code, then msgpack.
Who asks is decided by the ring a message arrives on, never by what it says.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from frontend_backend.errors import MessageError
from frontend_backend.messages import Protocol, later
from frontend_backend.messages_blobs import Export, ExportReply, Import, ImportReply
from frontend_backend.orders import Orders
from frontend_backend.tpmhdr import HEADER_SIZE, CommandHeader
from frontend_backend.tpmif import MAX_PACKET

VERSION: Final = 1
TAG_REQUEST: Final = 0x01C1  # VTPM_TAG_REQ
TAG_ANSWER: Final = 0x01C4  # VTPM_TAG_RSP


IDLE: Final = "idle"  # reasons of a Report that says "ready"
AWAKE: Final = "awake"
RESTORE_REFUSED: Final = "restore-refused"  # in any state: a state blob was put in that was not taken


class InstanceState(StrEnum):
    """How an instance describes itself in a report."""

    READY = "ready"
    NEEDS_RESET = "needs-reset"  # answers TPM_RC_FAILURE until a platform reset
    FAILED = "failed"  # could not load; nothing was changed; it exits
    STOPPED = "stopped"  # committed its last state; it exits


class RefusalCode(StrEnum):
    """Why the manager did not do what an instance asked."""

    MALFORMED = "malformed"
    UNKNOWN_VTPM = "unknown-vtpm"
    STALE_LEASE = "stale-lease"  # another instance holds this vTPM now
    STALE_GENERATION = "stale-generation"
    STORE_FAILED = "store-failed"  # nothing was committed
    UNAVAILABLE = "unavailable"  # not now, or not offered by this manager
    LIMIT = "limit"
    ROLLBACK = "rollback"  # an older state, which nobody permitted
    DENIED = "denied"  # not for this vTPM, or not with this hardware TPM; asking again does not help
    WANTED = "wanted"  # stay awake: there is something to do


@dataclass(frozen=True, slots=True)
class Load:
    """Ask for the key, hash and generation of this ring's vTPM."""


@dataclass(frozen=True, slots=True)
class LoadReply:
    """Answer to Load. `key` and `digest` have 32 bytes, or none when `fresh` (never started: manufacture it).

    `startup` is "clear", "state", "none", "deactivated" (TPM 1.2's ST_DEACTIVATED), or "failed" (answer TPM_RC_FAILURE
    until a platform reset). `commit_timeout` is in seconds. `measured` is extended, in order, after each
    Startup(CLEAR). What follows is for an instance that the manager did not start: as in Spawn, and what a Xen back end
    in its domain needs to know.
    """

    vtpm: bytes
    family: str
    lease: int
    fresh: bool
    key: bytes = field(repr=False)
    digest: bytes
    generation: int
    startup: str
    commit_timeout: float
    hw_pcrs: int = later(0)  # hardware PCRs to put into the vTPM after each Startup(CLEAR), bit 0 for PCR 0
    measured: tuple[bytes, ...] = later(())  # frontend_backend.measurements
    after_reset: str = later("")  # the startup after each platform reset, where `startup` does not say it
    localities: int = later(1)
    maintenance: bool = later(False)
    trace: bool = later(False)
    compat: bool = later(False)  # whether the driver's TPM 1.2 probes are answered for a TPM 2.0
    store: bytes = later(b"")  # the store's UUID, for an instance that makes its state image itself


@dataclass(frozen=True, slots=True)
class Commit:
    """Make (key, digest, generation) the vTPM's record. Sending the same triple again is harmless.

    `final` says that the state is that of a clean stop and that this instance will not commit again.
    """

    generation: int
    key: bytes = field(repr=False)
    digest: bytes
    lease: int
    final: bool = False
    restored: bytes = later(b"")  # of a state that state blobs brought in: the header of their export


@dataclass(frozen=True, slots=True)
class Hibernate:
    """Commit that also says: the state holds the volatile part, and once this is answered the instance ends."""

    generation: int
    key: bytes = field(repr=False)
    digest: bytes
    lease: int


@dataclass(frozen=True, slots=True)
class CommitReply:
    """The record is durable."""

    generation: int


@dataclass(frozen=True, slots=True)
class Random:
    """Ask for `count` (1 to 64) bytes from the hardware TPM mixed with the kernel's."""

    count: int


@dataclass(frozen=True, slots=True)
class RandomReply:
    """Answer to Random."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PcrRead:
    """Ask for hardware PCR values that this vTPM's attachment asks for: `bank` is "sha256", indices 0 to 23."""

    bank: str
    pcrs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PcrReadReply:
    """Answer to PcrRead: one digest per index asked for, in order."""

    values: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Measurements:
    """Ask what this boot of the guest is measured by: at each Startup(CLEAR) but that of a Load's answer."""


@dataclass(frozen=True, slots=True)
class MeasurementsReply:
    """Answer to Measurements: as LoadReply's `measured`."""

    measured: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Quote:
    """Ask, for the guest, for a deep quote over `nonce` (1 to 64 bytes); `evidence` is the vTPM's part of it."""

    nonce: bytes
    evidence: bytes


@dataclass(frozen=True, slots=True)
class QuoteReply:
    """Answer to Quote: the bundle of docs/attestation.md."""

    bundle: bytes


@dataclass(frozen=True, slots=True)
class QuoteTask:
    """Ask what the order QUOTE was for."""


@dataclass(frozen=True, slots=True)
class QuoteTaskReply:
    """Answer to QuoteTask: evidence over `nonce` of the PCRs in the bit map; ticket 0 when none is wanted any more."""

    ticket: int
    nonce: bytes = b""
    selection: int = 0


@dataclass(frozen=True, slots=True)
class QuoteMade:
    """The evidence that a task wanted, or why there is none; answered by ReportReply."""

    ticket: int
    evidence: bytes
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The instance's own state. `reason` is a word for programs, `text` a sentence for people.

    When it is "ready", the reason "idle" says that nothing was done since the last such report, and "awake" that an
    order to hibernate is not followed now. `quotes` says that it knows the order QUOTE.
    """

    state: InstanceState
    reason: str = ""
    text: str = ""
    quotes: bool = False


@dataclass(frozen=True, slots=True)
class ReportReply:
    """Answer to Report and QuoteMade; what matters are the orders that travel with it."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The manager did not do it; nothing was changed."""

    code: RefusalCode
    text: str


Request = (
    Load
    | Commit
    | Hibernate
    | Random
    | PcrRead
    | Measurements
    | Quote
    | QuoteTask
    | QuoteMade
    | Export
    | Import
    | Report
)
Reply = (
    LoadReply
    | CommitReply
    | RandomReply
    | PcrReadReply
    | MeasurementsReply
    | QuoteReply
    | QuoteTaskReply
    | ExportReply
    | ImportReply
    | ReportReply
    | Refusal
)

_NO_ORDERS: Final = ~int(Orders.STOP | Orders.RESET | Orders.HIBERNATE | Orders.QUOTE)
_HEADER: Final = CommandHeader.CODEC

_REQUESTS = Protocol(
    VERSION,
    (
        Load,
        Commit,
        Hibernate,
        Random,
        PcrRead,
        Measurements,
        Quote,
        QuoteTask,
        QuoteMade,
        Export,
        Import,
        Report,
    ),
)
_REPLIES = Protocol(
    VERSION,
    (
        LoadReply,
        CommitReply,
        RandomReply,
        PcrReadReply,
        MeasurementsReply,
        QuoteReply,
        QuoteTaskReply,
        ExportReply,
        ImportReply,
        ReportReply,
        Refusal,
    ),
)


def encode_request(message: Request) -> bytes:
    """Return the packet of a request."""
    return _packet(TAG_REQUEST, 0, _REQUESTS.encode(message))


def decode_request(untrusted: bytes) -> Request:
    """Return the request in a packet.

    Raises:
        MessageError: it is none.

    """
    message: Request = _REQUESTS.decode(_body(untrusted, TAG_REQUEST)[1])
    return message


def encode_reply(message: Reply, orders: Orders = Orders.NONE) -> bytes:
    """Return the packet of an answer; `orders` travel in the header's code."""
    return _packet(TAG_ANSWER, int(orders), _REPLIES.encode(message))


def decode_reply(untrusted: bytes) -> tuple[Reply, Orders]:
    """Return the answer in a packet, and the manager's orders.

    Raises:
        MessageError: it is none, or it carries orders this version does not know.

    """
    code, body = _body(untrusted, TAG_ANSWER)
    if code & _NO_ORDERS:
        raise MessageError(f"unknown orders {code:#x}")
    message: Reply = _REPLIES.decode(body)
    return message, Orders(code) if code else Orders.NONE


def _packet(tag: int, code: int, body: bytes) -> bytes:
    size = HEADER_SIZE + len(body)
    if size > MAX_PACKET:
        raise MessageError(f"a message of {size} bytes does not fit one page ({MAX_PACKET})")
    return _HEADER.pack(tag, size, code) + body


def _body(untrusted: bytes, tag: int) -> tuple[int, bytes]:
    if len(untrusted) < HEADER_SIZE:
        raise MessageError(f"a TPM header has {HEADER_SIZE} bytes, not {len(untrusted)}")
    found, size, code = _HEADER.unpack_from(untrusted)
    if found != tag or size != len(untrusted):
        raise MessageError(f"packet with tag {found:#06x} and size {size} in {len(untrusted)} bytes")
    return code, untrusted[HEADER_SIZE:]


def refusal_for_malformed(reason: str) -> bytes:
    """Return the answer to a request that could not be read (for BackRing)."""
    return encode_reply(Refusal(RefusalCode.MALFORMED, reason[:200]))
