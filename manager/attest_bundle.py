"""A deep quote as bytes: the statement that the hardware TPM signs a digest of, and the bundle that carries all of it.

The layouts are fixed (docs/attestation.md): every byte of a bundle is signed, or decides whether it can be read. What
lives here: layouts. What must not: judging them (attest_check), making them (quoting).
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Self
from uuid import UUID

from frontend_backend.deep_quote import MAX_EVIDENCE, Evidence, Reader, bits, check_wish, sized
from frontend_backend.errors import MessageError

_TEXT_BYTES: Final = 64  # of a guest's name, a front end, a version
_PCR_BYTES: Final = 32
MAX_BUNDLE: Final = 3136  # bytes; the longest there can be has 3,087, and an answer on a ring carries 4,088
_TOLD: Final = {None: 0, False: 1, True: 2}  # what is not known, is not so, is so


@dataclass(frozen=True, slots=True)
class Statement:
    """What a deep quote says of a vTPM; the SHA-256 of its bytes is the hardware quote's qualifying data.

    `approval` is the sequence of the newest approval that holds for the group, 0 for none; `generation` counts the
    vTPM's saved states. `startup` says who sends TPM2_Startup: "clear" or "state" the manager, "none" the guest's
    firmware; `hw_pcrs` which hardware PCRs were put into the vTPM at its start, as "0,2,7". `for_guest`: the guest
    asked, not an administrator. `evidence` is the SHA-256 of the evidence. `late`: whether the guest ran before it got
    the vTPM, None where that is not known; `event_log`: the SHA-256 of the log of the guest's boot (event_log), empty
    where that was not measured. A statement that says neither has version 1, as all had before these were there.
    """

    nonce: bytes
    vtpm: UUID
    group: UUID
    store: UUID
    approval: int
    generation: int
    for_guest: bool
    guest: str
    frontend: str
    startup: str
    hw_pcrs: str
    manager: str
    evidence: bytes
    late: bool | None = None
    event_log: bytes = b""

    HEAD: ClassVar[struct.Struct] = struct.Struct(">16sH")
    NUMBERS: ClassVar[struct.Struct] = struct.Struct(">16s16s16sQQB")
    MAGIC: ClassVar[bytes] = b"vTPM deep quote\0"
    VERSIONS: ClassVar[tuple[int, int]] = (1, 2)  # without and with `late` and `event_log`

    def pack(self) -> bytes:
        """Return its bytes."""
        first, second = self.VERSIONS
        boot = self.late is not None or bool(self.event_log)
        numbers = self.NUMBERS.pack(
            self.vtpm.bytes, self.group.bytes, self.store.bytes, self.approval, self.generation, self.for_guest
        )
        texts = b"".join(sized(text.encode()) for text in self._texts())
        head = self.HEAD.pack(self.MAGIC, second if boot else first) + sized(self.nonce)
        told = bytes([_TOLD[self.late]]) + (self.event_log or bytes(32)) if boot else b""
        return head + numbers + texts + self.evidence + told

    def _texts(self) -> tuple[str, ...]:
        return self.guest, self.frontend, self.startup, self.hw_pcrs, self.manager

    def digest(self) -> bytes:
        """Return the hardware quote's qualifying data, 32 bytes."""
        return hashlib.sha256(self.pack()).digest()

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        """Read what `pack` wrote, and nothing else.

        Raises:
            MessageError: it is something else.

        """
        reader = Reader(untrusted)
        magic, version = cls.HEAD.unpack(reader.take(cls.HEAD.size))
        if magic != cls.MAGIC or version not in cls.VERSIONS:
            raise MessageError("no statement of version 1 or 2")
        nonce = reader.sized()
        check_wish(nonce, 1)
        vtpm, group, store, approval, generation, for_guest = cls.NUMBERS.unpack(reader.take(cls.NUMBERS.size))
        if for_guest not in (0, 1):
            raise MessageError("a truth value that is neither")
        guest, frontend, startup, hw_pcrs, manager = (reader.text(_TEXT_BYTES) for _ in range(5))
        evidence = reader.take(32)
        late, event_log = _boot(reader) if version == cls.VERSIONS[1] else (None, b"")
        reader.end()
        return cls(
            nonce,
            *(UUID(bytes=vtpm), UUID(bytes=group), UUID(bytes=store)),
            *(approval, generation, bool(for_guest)),
            *(guest, frontend, startup, hw_pcrs, manager),
            evidence,
            late,
            event_log,
        )


def _boot(reader: Reader) -> tuple[bool | None, bytes]:
    """Read what a statement of version 2 says of the guest's boot. Raises MessageError: it says nothing."""
    number, digest = reader.number(1), reader.take(32)
    found = [late for late, wire in _TOLD.items() if wire == number]
    event_log = digest if any(digest) else b""
    if not found or (found == [None] and not event_log):
        raise MessageError("a statement of version 2 that says nothing of the guest's boot")
    return found[0], event_log


assert Statement.HEAD.size == 18, "docs/attestation.md: the head of a statement has 18 bytes"
assert Statement.NUMBERS.size == 65, "docs/attestation.md: three UUIDs, two numbers of 64 bits, one of 8"


@dataclass(frozen=True, slots=True)
class HardwareQuote:
    """What the hardware TPM gave: TPMS_ATTEST, TPMT_SIGNATURE, and the quoted PCRs' values (bit map, 32 bytes each)."""

    attest: bytes
    signature: bytes
    selection: int
    values: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """Everything that a verifier needs beside the attestation key's certificate."""

    statement: Statement
    evidence: Evidence
    hardware: HardwareQuote

    HEAD: ClassVar[struct.Struct] = struct.Struct(">8sH")
    MAGIC: ClassVar[bytes] = b"vTPMdeep"
    VERSION: ClassVar[int] = 1

    def pack(self) -> bytes:
        """Return its bytes.

        Raises:
            MessageError: they are more than an answer to a guest can carry.

        """
        parts = (self.statement.pack(), self.evidence.pack(), self.hardware.attest, self.hardware.signature)
        values = self.hardware.selection.to_bytes(4) + b"".join(self.hardware.values)
        packed = self.HEAD.pack(self.MAGIC, self.VERSION) + b"".join(map(sized, parts)) + values
        if len(packed) > MAX_BUNDLE:
            raise MessageError(f"a bundle of {len(packed)} bytes; at most {MAX_BUNDLE} can be")
        return packed

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        """Read what `pack` wrote, and nothing else.

        Raises:
            MessageError: it is something else.

        """
        if len(untrusted) > MAX_BUNDLE:
            raise MessageError(f"{len(untrusted)} bytes; a bundle has at most {MAX_BUNDLE}")
        reader = Reader(untrusted)
        magic, version = cls.HEAD.unpack(reader.take(cls.HEAD.size))
        if magic != cls.MAGIC:
            raise MessageError("no bundle of a deep quote")
        if version != cls.VERSION:
            raise MessageError(f"a bundle of version {version}; this program reads {cls.VERSION}")
        statement, evidence = Statement.unpack(reader.sized()), Evidence.unpack(reader.sized(MAX_EVIDENCE))
        attest, signature, selection = reader.sized(), reader.sized(), reader.number(4)
        check_wish(b"-", selection)
        values = tuple(reader.take(_PCR_BYTES) for _ in bits(selection))
        reader.end()
        return cls(statement, evidence, HardwareQuote(attest, signature, selection, values))
