"""Puts values into a vTPM's PCRs after its Startup(CLEAR): the hardware TPM's (Xen's hwinitpcr), boot measurements.

libtpms has no command that sets a PCR, so they are extended, once. V is the hardware's SHA-256 value, 32 bytes:

    SHA-256 bank    PCR = SHA-256(start || V)
    other bank H    PCR = H(start || H(V))        as TPM2_PCR_Event does with V
    TPM 1.2         PCR = SHA-1(start || SHA-1(V))

`start` is the PCR's value after Startup(CLEAR): zeros, ones for PCR 17 to 22. A boot measurement has a digest of its
own for each bank (frontend_backend.measurements). Source: TPM 2.0 Part 3, 22.2 (TPM2_PCR_Extend); TPM 1.2 Part 3, 16.1
(TPM_Extend).
"""

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from frontend_backend.errors import MessageError
from frontend_backend.measurements import unpack
from frontend_backend.tpmhdr import HEADER_SIZE, Tag, TpmFamily, command
from vtpm_instance.errors import BootNotMeasuredError, HardwarePcrsError
from vtpm_instance.tpm_commands import code_of

LOCALITY: Final = 2  # from which every PCR can be extended (PC Client profile, table of PCR attributes)
_EXTEND, _GET_CAPABILITY, _EXTEND_12 = 0x182, 0x17A, 0x14  # Part 2, 6.5.2; TPM 1.2 Part 2, 17
_CAP_PCRS: Final = 5  # Part 2, 6.12
_SHA1: Final = 0x0004
_PASSWORD: Final = struct.pack(">IIHBH", 9, 0x4000_0009, 0, 0, 0)  # size, TPM_RS_PW, no nonce, flags, no password
_SHA256: Final = 0x000B
_HASHES: Final = {_SHA1: "sha1", _SHA256: "sha256", 0x000C: "sha384", 0x000D: "sha512"}  # Part 2, 6.3 TPM_ALG_ID

Process = Callable[[bytes, int], bytes]
"""Executes one command at a locality."""


def put_in(process: Process, family: TpmFamily, values: Mapping[int, bytes]) -> None:
    """Extend each PCR (0 to 23) by the hardware's value (32 bytes), in every bank that the vTPM has.

    Raises:
        HardwarePcrsError: the vTPM refused; some PCRs may be extended.

    """
    banks = _banks_of(process, family)
    for pcr, value in sorted(values.items()):
        _extend(process, family, pcr, {bank: _digest(bank, value) for bank in banks})


def measure(process: Process, family: TpmFamily, measured: Sequence[bytes]) -> None:
    """Extend what the manager says that the guest is started with, in its order, in every bank that the vTPM has.

    Raises:
        BootNotMeasuredError: it is no measurement, has no digest for a bank, or the vTPM refused; some may be extended.

    """
    banks = _banks_of(process, family) if measured else ()
    for packed in measured:
        try:
            pcr, digests = unpack(packed)
            _extend(process, family, pcr, {bank: digests[bank] for bank in banks})
        except (MessageError, KeyError, HardwarePcrsError) as error:
            raise BootNotMeasuredError(f"what the manager told cannot be used ({error!r})") from error


def _extend(process: Process, family: TpmFamily, pcr: int, digests: Mapping[int, bytes]) -> None:
    """Extend a PCR in the banks of `digests`, by TPM_ALG_ID; a TPM 1.2 has SHA-1's alone."""
    if family is TpmFamily.TPM_1_2:
        packet = command(_EXTEND_12, pcr.to_bytes(4) + digests[_SHA1], Tag.TPM12_REQUEST)
    else:
        values = b"".join(bank.to_bytes(2) + digest for bank, digest in digests.items())
        body = pcr.to_bytes(4) + _PASSWORD + len(digests).to_bytes(4) + values
        packet = command(_EXTEND, body, Tag.TPM2_SESSIONS)
    _run(process, packet, f"extend PCR {pcr}")


def _banks_of(process: Process, family: TpmFamily) -> tuple[int, ...]:
    return (_SHA1,) if family is TpmFamily.TPM_1_2 else tuple(_banks(process))


def _digest(bank: int, value: bytes) -> bytes:
    return value if bank == _SHA256 else hashlib.new(_HASHES[bank], value).digest()


def _banks(process: Process) -> Iterator[int]:
    """Yield the banks that have PCRs. Part 3, 30.2; Part 2, 10.14.1 TPML_PCR_SELECTION."""
    answer = _run(process, command(_GET_CAPABILITY, struct.pack(">III", _CAP_PCRS, 0, 1)), "list its banks")
    (count,) = struct.unpack_from(">I", answer, HEADER_SIZE + 5)
    offset = HEADER_SIZE + 9
    for _ in range(count):
        bank, size = struct.unpack_from(">HB", answer, offset)
        if any(answer[offset + 3 : offset + 3 + size]):
            if bank not in _HASHES:
                raise HardwarePcrsError(f"the vTPM has a PCR bank 0x{bank:04x}, for which there is no hash here")
            yield bank
        offset += 3 + size


def _run(process: Process, packet: bytes, doing: str) -> bytes:
    answer = process(packet, LOCALITY)
    if code := code_of(answer):
        raise HardwarePcrsError(f"the vTPM refused to {doing}: 0x{code:x}")
    return answer
