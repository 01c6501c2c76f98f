"""Boot measurements: what a guest is started with, as digests that go into its vTPM's PCRs before it runs.

Which PCR holds what, and the order of the extends, are pv-grub's (Xen, stubdom/grub/kexec.c, tpm_hash2pcr): the kernel
goes into PCR 4, the command line and then the initrd into PCR 5, each file and the text as it is, without its end.
What lives here: what a measurement is, as text (catalogue, `vtpm-attach --measure`) and as bytes (to an instance).
"""

import hashlib
import itertools
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from frontend_backend.errors import MessageError

ALGORITHMS: Final[Mapping[str, int]] = {"sha1": 0x0004, "sha256": 0x000B, "sha384": 0x000C, "sha512": 0x000D}
"""Banks that a vTPM may have, with their TPM_ALG_ID (TPM 2.0 Part 2, 6.3); a TPM 1.2 has SHA-1 alone."""
PCR_OF: Final[Mapping[str, int]] = {"kernel": 4, "cmdline": 5, "initrd": 5}
"""What can be measured, in the order in which it is extended."""
_ORDER: Final = tuple(PCR_OF)
_SIZES: Final = {name: hashlib.new(name).digest_size for name in ALGORITHMS}
_NAMES: Final = {number: name for name, number in ALGORITHMS.items()}
_HEAD: Final = struct.Struct(">BI")  # the PCR, then TPML_DIGEST_VALUES: count, and for each u16 algorithm and digest
assert _HEAD.size == 5


@dataclass(frozen=True, slots=True)
class Measurement:
    """One thing that was measured: `what` is a key of PCR_OF, `digests` has one for each of ALGORITHMS."""

    what: str
    digests: Mapping[str, bytes]

    @property
    def pcr(self) -> int:
        """The PCR that it goes into."""
        return PCR_OF[self.what]

    @classmethod
    def of(cls, what: str, content: Iterable[bytes]) -> Self:
        """Measure what `content` yields piece by piece."""
        hashes = {name: hashlib.new(name) for name in ALGORITHMS}
        for piece in content:
            for one in hashes.values():
                one.update(piece)
        return cls(what, {name: one.digest() for name, one in hashes.items()})

    def to_text(self) -> str:
        """Return it as `kernel:sha1=HEX,sha256=HEX,sha384=HEX,sha512=HEX`."""
        return f"{self.what}:" + ",".join(f"{name}={self.digests[name].hex()}" for name in ALGORITHMS)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what `to_text` returns, the digests in any order.

        Raises:
            MessageError: it is something else; every digest must be there, since a vTPM may have every bank.

        """
        what, colon, rest = text.partition(":")
        if what not in PCR_OF or not colon:
            raise MessageError(f"'{text[:60]}' names no measurement: {', '.join(PCR_OF)} can be")
        digests: dict[str, bytes] = {}
        for part in rest.split(","):
            name, _, value = part.partition("=")
            try:
                digest = bytes.fromhex(value)
            except ValueError:
                raise MessageError(f"the {name[:20]} digest of {what} is not hexadecimal") from None
            if name not in ALGORITHMS or name in digests or len(digest) != _SIZES[name]:
                raise MessageError(f"'{part[:60]}' is no digest of {what}: {', '.join(ALGORITHMS)}, each once")
            digests[name] = digest
        missing = [name for name in ALGORITHMS if name not in digests]
        if missing:
            raise MessageError(f"{what} has no {' and no '.join(missing)} digest: a vTPM may have every bank")
        return cls(what, digests)

    def pack(self) -> bytes:
        """Return what an instance is told: the PCR (u8) and a TPML_DIGEST_VALUES."""
        values = b"".join(number.to_bytes(2) + self.digests[name] for name, number in ALGORITHMS.items())
        return _HEAD.pack(self.pcr, len(ALGORITHMS)) + values


def unpack(packed: bytes) -> tuple[int, dict[int, bytes]]:
    """Return the PCR and the digests by TPM_ALG_ID that `Measurement.pack` wrote.

    Raises:
        MessageError: it is something else.

    """
    if len(packed) < _HEAD.size:
        raise MessageError(f"a measurement of {len(packed)} bytes")
    pcr, count = _HEAD.unpack_from(packed)
    digests: dict[int, bytes] = {}
    at = _HEAD.size
    for _ in range(count):
        number = int.from_bytes(packed[at : at + 2])
        size = _SIZES.get(_NAMES.get(number, ""), 0)
        digest = packed[at + 2 : at + 2 + size]
        if not size or len(digest) != size or number in digests:
            raise MessageError(f"a measurement with a digest of algorithm {number:#06x} that cannot be")
        digests[number] = digest
        at += 2 + size
    if at != len(packed) or pcr not in PCR_OF.values():
        raise MessageError(f"a measurement for PCR {pcr}, with {len(packed) - at} bytes too many")
    return pcr, digests


def in_order(measurements: Iterable[Measurement]) -> tuple[Measurement, ...]:
    """Return them as they are extended. Raises MessageError: one is there twice."""
    found = sorted(measurements, key=lambda measurement: _ORDER.index(measurement.what))
    for one, next_ in itertools.pairwise(found):
        if one.what == next_.what:
            raise MessageError(f"{one.what} is measured twice")
    return tuple(found)


def all_to_text(measurements: Iterable[Measurement]) -> str:
    """Return several as one text, in order, "" for none."""
    return " ".join(measurement.to_text() for measurement in in_order(measurements))


def all_from_text(text: str) -> tuple[Measurement, ...]:
    """Read what `all_to_text` returned. Raises MessageError."""
    return in_order(map(Measurement.from_text, text.split()))
