"""PCRs, the locality probe, PCR 22 (the volatile anchor), the clock, properties and random numbers.

The probe uses PCR 20, never PCR 22: resetting 22 would forget the volatile anchor.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Any, Final

from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPML_DIGEST_VALUES,
    TPMT_HA,
    TPMU_HA,
    TSS2_Exception,
)

from manager.hwtpm_errors import BadSetting, PcrsMoving, TpmTransport, VolatileAnchorUnavailable, WrongLocality
from manager.hwtpm_link import TpmLink
from manager.hwtpm_rc import RC_LOCALITY, tpm_code
from manager.hwtpm_records import ClockState, LocalityReport, TpmProperties

VOLATILE_ANCHOR_PCR: Final = 22
DIGEST_BYTES: Final = 32
_READ_TRIES: Final = 16
_READ_PER_COMMAND: Final = 8  # TPML_DIGEST holds 8, Part 2, 10.9.9
# Part 2, 8.6 TPMA_PERMANENT.
_OWNER_AUTH_SET, _ENDORSEMENT_AUTH_SET, _LOCKOUT_AUTH_SET, _IN_LOCKOUT = 1, 2, 4, 1 << 9


class Property(IntEnum):
    """The properties we read. Source: Part 2, 6.13 TPM_PT."""

    MANUFACTURER = 0x105
    VENDOR_1 = 0x106
    VENDOR_2 = 0x107
    VENDOR_3 = 0x108
    VENDOR_4 = 0x109
    FIRMWARE_1 = 0x10B
    FIRMWARE_2 = 0x10C
    PERMANENT = 0x200
    LOCKOUT_COUNTER = 0x20E
    MAX_AUTH_FAIL = 0x20F
    LOCKOUT_INTERVAL = 0x210
    LOCKOUT_RECOVERY = 0x211


def selection_text(selection: Iterable[int]) -> str:
    """Write a PCR selection of the SHA-256 bank as tpm2_pytss reads it."""
    return "sha256:" + ",".join(str(pcr) for pcr in sorted(selection))


def read_pcrs(esapi: Any, selection: Iterable[int]) -> dict[int, bytes]:
    """Read the values of these PCRs (SHA-256 bank, 32 bytes each), eight to a command. Inside an operation.

    Raises BadSetting if the TPM has no SHA-256 bank.
    """
    wanted = sorted(set(selection))
    values: dict[int, bytes] = {}
    for start in range(0, len(wanted), _READ_PER_COMMAND):
        part = wanted[start : start + _READ_PER_COMMAND]
        _, _, digests = esapi.pcr_read(selection_text(part))
        if len(digests) != len(part):
            raise BadSetting(
                f"The TPM gave {len(digests)} of {len(part)} PCRs, so its SHA-256 bank is not active",
                "Activate the bank in the firmware set-up, or with `tpm2_pcrallocate sha256:all` and a reboot.",
            )
        values.update(zip(part, (bytes(digest) for digest in digests), strict=True))
    return values


def read_pcrs_together(link: TpmLink, selection: Iterable[int]) -> dict[int, bytes]:
    """Read values that were there at one time: read twice, until both agree. Raises PcrsMoving.

    The TPM's update counter would tell for some PCRs only (16 and 21 to 23 do not move it in libtpms), and eight PCRs
    go into one answer.
    """
    wanted = frozenset(selection)
    with link.operation("read PCRs") as esapi:
        before = read_pcrs(esapi, wanted)
        for _ in range(_READ_TRIES):
            again = read_pcrs(esapi, wanted)
            if again == before:
                return again
            before = again
    raise PcrsMoving(_READ_TRIES, "read them together")


def check_locality(link: TpmLink) -> LocalityReport:
    """Prove the locality: PCR 20 can be reset at 2 and, where the transport can try, not at 0.

    Raises WrongLocality if either does not hold. In the allowed mode at locality 0 nothing is proved.
    """
    if link.locality != 2:
        with link.operation("reach it"):
            return LocalityReport(link.locality, None, weaker=True)
    if (code := _try_reset(link, 2)) is not None:
        raise WrongLocality(2, f"resetting PCR 20 there gives 0x{code:x}")
    if 0 not in link.localities:
        return LocalityReport(2, None, weaker=False)
    code = _try_reset(link, 0)
    if code != RC_LOCALITY:
        shown = "is accepted" if code is None else f"gives 0x{code:x}"
        raise WrongLocality(2, f"resetting PCR 20 at locality 0 {shown}, so localities mean nothing here")
    return LocalityReport(2, refused_at_zero=True, weaker=False)


def _try_reset(link: TpmLink, locality: int) -> int | None:
    with link.operation(f"reset PCR 20 at locality {locality}", locality=locality) as esapi:
        try:
            esapi.pcr_reset(ESYS_TR.PCR20)
        except TSS2_Exception as error:
            if tpm_code(error) == -1:
                raise
            return tpm_code(error)
        return None


def pcr22_read(link: TpmLink) -> bytes:
    """Return the volatile anchor, 32 bytes. Raises VolatileAnchorUnavailable at another locality than 2."""
    _need_two(link)
    with link.operation("read PCR 22") as esapi:
        return read_pcrs(esapi, {VOLATILE_ANCHOR_PCR})[VOLATILE_ANCHOR_PCR]


def pcr22_extend(link: TpmLink, digest: bytes) -> None:
    """Extend the volatile anchor by a digest of 32 bytes. Raises VolatileAnchorUnavailable."""
    _need_two(link)
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"PCR 22 is extended by {DIGEST_BYTES} bytes, not {len(digest)}")
    values = TPML_DIGEST_VALUES([TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=digest))])
    with link.operation("extend PCR 22") as esapi:
        esapi.pcr_extend(ESYS_TR.PCR22, values)


def _need_two(link: TpmLink) -> None:
    if link.locality != 2:
        raise VolatileAnchorUnavailable(link.locality)


def clock(link: TpmLink) -> ClockState:
    """Read the clock by TPM2_ReadClock. Part 3, 29.1."""
    with link.operation("read the clock") as esapi:
        info = esapi.read_clock().clockInfo
        return ClockState(int(info.resetCount), int(info.restartCount), bool(info.safe))


def properties(link: TpmLink) -> TpmProperties:
    """Read manufacturer, firmware, dictionary-attack state and which hierarchies have a password."""
    with link.operation("read its properties") as esapi:
        values = {Property(number): _property(esapi, number) for number in Property}
    permanent = values[Property.PERMANENT]
    version = values[Property.FIRMWARE_1], values[Property.FIRMWARE_2]
    vendor = (Property.VENDOR_1, Property.VENDOR_2, Property.VENDOR_3, Property.VENDOR_4)
    return TpmProperties(
        manufacturer=_text(values[Property.MANUFACTURER]).strip(),
        vendor="".join(_text(values[number]) for number in vendor).strip(),
        firmware=".".join(str(half) for word in version for half in (word >> 16, word & 0xFFFF)),
        owner_auth_set=bool(permanent & _OWNER_AUTH_SET),
        endorsement_auth_set=bool(permanent & _ENDORSEMENT_AUTH_SET),
        lockout_auth_set=bool(permanent & _LOCKOUT_AUTH_SET),
        in_lockout=bool(permanent & _IN_LOCKOUT),
        lockout_counter=values[Property.LOCKOUT_COUNTER],
        max_auth_fail=values[Property.MAX_AUTH_FAIL],
        lockout_interval=values[Property.LOCKOUT_INTERVAL],
        lockout_recovery=values[Property.LOCKOUT_RECOVERY],
    )


def _property(esapi: Any, number: int) -> int:
    """Read one property; the TPM answers with the next one it has if it lacks this one."""
    _, data = esapi.get_capability(TPM2_CAP.TPM_PROPERTIES, number, 1)
    found = {int(item.property): int(item.value) for item in data.data.tpmProperties}
    if number not in found:
        raise TpmTransport("read its properties", f"property 0x{number:x} is missing")
    return found[number]


def _text(word: int) -> str:
    """Unpack four characters packed into a u32; what is not printable ASCII is left out."""
    return "".join(chr(byte) for byte in word.to_bytes(4) if 0x20 <= byte < 0x7F)
