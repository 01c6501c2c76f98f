"""Response codes of the TPM and the TSS, and the one place that turns them into our errors.

Source: TPM 2.0 Part 2, 6.6 (TPM_RC); tss2_common.h (layers); measured table in reference hardware-tpm.md section 2.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from tpm2_pytss import TSS2_Exception

from manager.hwtpm_errors import (
    OwnerAuthWanted,
    TpmError,
    TpmFailureMode,
    TpmFull,
    TpmLockout,
    TpmNotStarted,
    TpmTransport,
    TpmWasReset,
    UnknownTpmCode,
    WrongLocality,
)

RC_INITIALIZE: Final = 0x100
RC_FAILURE: Final = 0x101
RC_PCR_CHANGED: Final = 0x128
RC_AUTH_UNAVAILABLE: Final = 0x12F
RC_NV_AUTHORIZATION: Final = 0x149
RC_NV_UNINITIALIZED: Final = 0x14A
RC_NV_SPACE: Final = 0x14B
RC_NV_DEFINED: Final = 0x14C
RC_NEEDS_TEST: Final = 0x153
RC_LOCALITY: Final = 0x907
RC_TESTING: Final = 0x90A
RC_LOCKOUT: Final = 0x921
# Format-one codes, without the number of the handle, session or parameter they are about.
RC_VALUE: Final = 0x84
RC_HANDLE: Final = 0x8B
RC_AUTH_FAIL: Final = 0x8E
RC_SIGNATURE: Final = 0x9B
RC_POLICY_FAIL: Final = 0x9D
RC_BAD_AUTH: Final = 0xA2

_FORMAT_ONE: Final = 0x80
_FORMAT_ONE_BITS: Final = 0xBF
_LAYER_SHIFT: Final = 16
# The TPM itself, and the two layers under which resource managers pass its codes on.
_TPM_LAYERS: Final = frozenset({0, 11, 12})

_GENERAL: Final[Mapping[int, Callable[[str], TpmError]]] = {
    RC_INITIALIZE: TpmNotStarted,
    RC_FAILURE: lambda doing: TpmFailureMode(doing, "it answered TPM_RC_FAILURE"),
    RC_LOCALITY: lambda doing: WrongLocality(2, f"it refused to {doing}"),
    RC_LOCKOUT: TpmLockout,
    RC_NV_SPACE: lambda doing: TpmFull(doing, "an NV index"),
    RC_BAD_AUTH: OwnerAuthWanted,
    RC_AUTH_FAIL: OwnerAuthWanted,
    0x900: lambda doing: TpmFull(doing, "a saved context"),
    0x901: lambda doing: TpmFull(doing, "an object context"),
    0x902: lambda doing: TpmFull(doing, "a transient object"),
    0x903: lambda doing: TpmFull(doing, "a loaded session"),
    0x904: lambda doing: TpmFull(doing, "its own work"),
    0x905: lambda doing: TpmFull(doing, "an active session"),
    # Part 2, 6.6.3 TPM_RC_REFERENCE_H0..H6 and S0..S6: what we had loaded is gone
    **dict.fromkeys((*range(0x910, 0x917), *range(0x918, 0x91F)), TpmWasReset),
}

Special = Mapping[int, Callable[[], TpmError]]
"""Meaning of codes in one command: code as `tpm_code` gives it -> the error to raise."""


def tpm_code(error: TSS2_Exception) -> int:
    """Return the TPM's own code without handle, session and parameter numbers; -1 if it came from the TSS."""
    rc = int(error.rc)
    if rc >> _LAYER_SHIFT not in _TPM_LAYERS:
        return -1
    return rc & _FORMAT_ONE_BITS if rc & _FORMAT_ONE else rc & 0xFFFF


def is_about_arguments(error: TSS2_Exception) -> bool:
    """Say True if the TPM found a handle or parameter wrong (a format-one code), passwords left aside."""
    code = tpm_code(error)
    return code != -1 and bool(code & _FORMAT_ONE) and code not in {RC_AUTH_FAIL, RC_BAD_AUTH}


def context_survives(error: TSS2_Exception) -> bool:
    """Say False if the ESAPI context may be dead: after failures of the TSS or the bus it never recovers."""
    return tpm_code(error) != -1


def translate(error: TSS2_Exception, doing: str) -> TpmError:
    """Return the error of our tree for a code; `doing` completes "refused to ...". Unknown codes: UnknownTpmCode."""
    code = tpm_code(error)
    if code == -1:
        return TpmTransport(doing, f"0x{int(error.rc):x}: {error}")
    make = _GENERAL.get(code)
    return UnknownTpmCode(doing, int(error.rc), str(error)) if make is None else make(doing)


@contextmanager
def meaning(special: Special) -> Iterator[None]:
    """Make these codes raise these errors inside; others pass for `translate`."""
    try:
        yield
    except TSS2_Exception as error:
        make = special.get(tpm_code(error))
        if make is None:
            raise
        raise make() from error
