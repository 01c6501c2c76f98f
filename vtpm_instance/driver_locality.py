"""The command by which Linux' vTPM proxy driver sets the locality of what follows, before each command of a program.

It is a packet like a TPM command's, with one byte after the header, and never reaches the TPM.
Source: linux/vtpm_proxy.h (TPM2_CC_SET_LOCALITY and TPM_ORD_SET_LOCALITY); reference/swtpm-libtpms-qemu.md 1.7.
"""

from collections.abc import Callable
from typing import Final

from frontend_backend.tpmhdr import HEADER_SIZE, TpmFamily, error_response

SET_LOCALITY: Final = 0x20001000
PACKED: Final = SET_LOCALITY.to_bytes(4)  # as it stands in a packet
_BAD_LOCALITY: Final = {TpmFamily.TPM_2_0: 0x107, TpmFamily.TPM_1_2: 0x3D}  # swtpm's; TPM_BAD_LOCALITY
_TOO_SHORT: Final = {TpmFamily.TPM_2_0: 0x9A, TpmFamily.TPM_1_2: 0x19}  # TPM_RC_INSUFFICIENT, TPM_BAD_PARAM_SIZE


def answer(command: bytes, family: TpmFamily, set_locality: Callable[[int], int]) -> bytes:
    """Do what the driver asks, and return its answer; `set_locality` returns 0, or why not."""
    if len(command) == HEADER_SIZE:
        return error_response(family, _TOO_SHORT[family])
    return error_response(family, _BAD_LOCALITY[family] if set_locality(command[HEADER_SIZE]) else 0)
