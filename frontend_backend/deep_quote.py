"""What a guest sends for a deep quote, and the evidence that an instance gives of its vTPM; bytes only.

Both layouts are written down in docs/attestation.md. All integers are big-endian. What lives here: layouts. What must
not: making evidence (vtpm_instance.evidence), signing and judging it (manager).
"""

import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from frontend_backend.errors import MessageError
from frontend_backend.tpmhdr import HEADER_SIZE, Tag, TpmFamily, command

# Bit 29 says "vendor's own" in both families (TPM 2.0 Part 2, 8.9 TPMA_CC; TPM 1.2 Part 2, 17); 22 is Xen's number for
# a deep quote (reference xen-vtpm.md 1.7), whose body is another.
CODE: Final = 0x2000_0016
MAX_NONCE: Final = 64  # bytes; what TPM2_Quote takes as qualifying data has at least that (Part 2, 10.4.3)
PCR_COUNT: Final = 24
SELECT_BYTES: Final = PCR_COUNT // 8
MAX_EVIDENCE: Final = 1536  # bytes; 24 values of 32 bytes and a P-256 quote have about 1,200
DIGEST_BYTES: Final = {TpmFamily.TPM_2_0: 32, TpmFamily.TPM_1_2: 20}  # of a PCR: the SHA-256 bank, or SHA-1
_REQUEST_TAG: Final = {TpmFamily.TPM_2_0: Tag.TPM2_NO_SESSIONS, TpmFamily.TPM_1_2: Tag.TPM12_REQUEST}
_RESPONSE_TAG: Final = {TpmFamily.TPM_2_0: Tag.TPM2_NO_SESSIONS, TpmFamily.TPM_1_2: Tag.TPM12_RESPONSE}


def bits(selection: int) -> tuple[int, ...]:
    """Return the PCR numbers of a bit map, ascending."""
    return tuple(pcr for pcr in range(PCR_COUNT) if selection >> pcr & 1)


def check_wish(nonce: bytes, selection: int) -> None:
    """Check what somebody wants quoted.

    Raises:
        MessageError: the nonce has not 1 to 64 bytes, or no PCR (or one that does not exist) is selected.

    """
    if not 1 <= len(nonce) <= MAX_NONCE:
        raise MessageError(f"a nonce of {len(nonce)} bytes; 1 to {MAX_NONCE} can be")
    if not 0 < selection < 1 << PCR_COUNT:
        raise MessageError(f"a selection of PCRs {selection:#x}")


@dataclass(frozen=True, slots=True)
class DeepQuoteCommand:
    """A guest's command: after the header the nonce (u16 size, bytes) and the vTPM's PCRs (u8 size 3, bit map)."""

    nonce: bytes
    selection: int

    def pack(self, family: TpmFamily) -> bytes:
        """Return the whole command."""
        select = bytes([SELECT_BYTES]) + self.selection.to_bytes(SELECT_BYTES, "little")
        return command(CODE, struct.pack(">H", len(self.nonce)) + self.nonce + select, _REQUEST_TAG[family])

    @classmethod
    def unpack(cls, untrusted: bytes, family: TpmFamily) -> Self:
        """Read a framed command whose code is CODE.

        Raises:
            MessageError: another tag (sessions mean nothing here), or not this layout.

        """
        if int.from_bytes(untrusted[:2]) != _REQUEST_TAG[family]:
            raise MessageError("a deep quote takes no sessions")
        reader = Reader(untrusted[HEADER_SIZE:])
        nonce = reader.sized()
        if reader.number(1) != SELECT_BYTES:
            raise MessageError(f"a selection has {SELECT_BYTES} bytes")
        selection = int.from_bytes(reader.take(SELECT_BYTES), "little")
        reader.end()
        check_wish(nonce, selection)
        return cls(nonce, selection)


def success(family: TpmFamily, bundle: bytes) -> bytes:
    """Return the answer to a guest: header, then the bundle (u16 size, bytes)."""
    return command(0, struct.pack(">H", len(bundle)) + bundle, _RESPONSE_TAG[family])


class Reader:
    """Takes a packet apart from its start; whatever is not there raises MessageError."""

    def __init__(self, untrusted: bytes) -> None:
        """Read `untrusted`."""
        self._data, self._at = untrusted, 0

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > len(self._data) - self._at:
            raise MessageError(f"{count} bytes wanted at {self._at} of {len(self._data)}")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        """Return an unsigned big-endian number of `size` bytes."""
        return int.from_bytes(self.take(size))

    def sized(self, most: int | None = None) -> bytes:
        """Return what a u16 size stands before, at most `most` bytes."""
        count = self.number(2)
        if most is not None and count > most:
            raise MessageError(f"{count} bytes where {most} at most can be")
        return self.take(count)

    def text(self, most: int) -> str:
        """Return UTF-8 of at most `most` bytes after a u16 size, printable."""
        try:
            found = self.sized(most).decode()
        except UnicodeDecodeError:
            raise MessageError("text that is no UTF-8") from None
        if not found.isprintable():
            raise MessageError("text that cannot be printed")
        return found

    def end(self) -> None:
        """Check that nothing is left."""
        if self._at != len(self._data):
            raise MessageError(f"{len(self._data) - self._at} bytes too many")


def sized(data: bytes) -> bytes:
    """Return `data` with its u16 size before it."""
    return struct.pack(">H", len(data)) + data


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an instance says of its vTPM's PCRs.

    `values` are those of `selection` in ascending order: the SHA-256 bank, or a TPM 1.2's 20 bytes each. Of a TPM 2.0
    there is its own quote over them: `public` (TPMT_PUBLIC), `attest` (TPMS_ATTEST), `signature` (TPMT_SIGNATURE); of
    a TPM 1.2 these three are empty.
    """

    family: TpmFamily
    emulator: str
    selection: int
    values: tuple[bytes, ...]
    public: bytes = b""
    attest: bytes = b""
    signature: bytes = b""

    HEAD: ClassVar[struct.Struct] = struct.Struct(">8sHH")
    MAGIC: ClassVar[bytes] = b"vTPMevid"
    VERSION: ClassVar[int] = 1
    FAMILIES: ClassVar[dict[TpmFamily, int]] = {TpmFamily.TPM_2_0: 0x0200, TpmFamily.TPM_1_2: 0x0102}

    def pack(self) -> bytes:
        """Return its bytes, at most MAX_EVIDENCE of them."""
        head = self.HEAD.pack(self.MAGIC, self.VERSION, self.FAMILIES[self.family])
        select = self.selection.to_bytes(4)
        parts = (self.public, self.attest, self.signature)
        return head + sized(self.emulator.encode()) + select + b"".join(self.values) + b"".join(map(sized, parts))

    @classmethod
    def unpack(cls, untrusted: bytes) -> Self:
        """Read what `pack` wrote; nothing else passes, so each evidence has one encoding.

        Raises:
            MessageError: it is something else.

        """
        if len(untrusted) > MAX_EVIDENCE:
            raise MessageError(f"evidence of {len(untrusted)} bytes; at most {MAX_EVIDENCE} can be")
        reader = Reader(untrusted)
        magic, version, number = cls.HEAD.unpack(reader.take(cls.HEAD.size))
        if magic != cls.MAGIC or version != cls.VERSION:
            raise MessageError("no evidence of version 1")
        family = next((family for family, known in cls.FAMILIES.items() if known == number), None)
        if family is None:
            raise MessageError(f"evidence of a TPM family {number:#06x}")
        emulator = reader.text(64)
        selection = reader.number(4)
        check_wish(b"-", selection)
        values = tuple(reader.take(DIGEST_BYTES[family]) for _ in bits(selection))
        public, attest, signature = (reader.sized() for _ in range(3))
        reader.end()
        if (family is TpmFamily.TPM_2_0) != all((public, attest, signature)) or (
            family is TpmFamily.TPM_1_2 and any((public, attest, signature))
        ):
            raise MessageError("a TPM 2.0 gives a quote of its own, a TPM 1.2 none")
        return cls(family, emulator, selection, values, public, attest, signature)


assert Evidence.HEAD.size == 12, "docs/attestation.md: the head of evidence has 12 bytes"
