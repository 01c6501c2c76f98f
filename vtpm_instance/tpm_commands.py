"""The few TPM commands an instance itself sends, as bytes, and what it needs to know of a guest's commands.

Source: TPM 2.0 Part 2 (command codes 6.5.2, response codes 6.6.3) and Part 3; TPM 1.2 Part 2 and Part 3.
"""

import struct
from enum import Enum
from typing import Final

from frontend_backend import deep_quote
from frontend_backend.tpmhdr import Tag, TpmFamily, command

CODE_OFFSET: Final = 6  # bytes before the command or response code in a header
CODE_END: Final = 10

TPM2_STARTUP: Final = 0x144
TPM2_SHUTDOWN: Final = 0x145
TPM2_STIR_RANDOM: Final = 0x146
TPM2_READ_CLOCK: Final = 0x181
TPM12_SAVE_STATE: Final = 0x98
TPM12_STARTUP: Final = 0x99
RC_INITIALIZE: Final = 0x100  # TPM 2.0: no Startup yet
TPM12_INVALID_POSTINIT: Final = 0x26  # TPM 1.2: no Startup yet, or a second one

MARGIN: Final = 8 * 1024  # bytes a state may grow in one command, with what a later Shutdown(STATE) takes kept free
_SHUTDOWN: Final = 4 * 1024  # bytes: Shutdown(STATE) was measured to add 3,094
_UPDATE: Final = 1024  # bytes: authorisations, attributes, counters and clocks that are stored in place

# How much the stored state may grow in a command. Of TPM 2.0 only NV_DefineSpace (2 KiB and its head) and EvictControl
# (one object) add something large. Of TPM 1.2 only what surely adds nothing is listed: PcrRead, GetCapability,
# GetRandom, SelfTestFull, GetTestResult, GetTicks.
_GROWTH_20: Final = {0x12A: MARGIN, 0x120: MARGIN, TPM2_SHUTDOWN: _SHUTDOWN}
_GROWTH_12: Final = {**dict.fromkeys((0x15, 0x65, 0x46, 0x50, 0x54, 0xF1), _UPDATE), TPM12_SAVE_STATE: _SHUTDOWN}


# What may take long: it makes RSA keys (20 to 200 ms, seconds on a slow machine) or tests everything.
# CreatePrimary, Create, CreateLoaded, SelfTest, IncrementalSelfTest; of TPM 1.2 TakeOwnership, CreateWrapKey,
# CreateEndorsementKeyPair, MakeIdentity, SelfTestFull. A deep quote waits for the manager and its hardware TPM.
_LONG_20: Final = (0x131, 0x153, 0x191, 0x143, 0x142, deep_quote.CODE)
_LONG_12: Final = (0x0D, 0x1F, 0x78, 0x79, 0x50, deep_quote.CODE)


def long_commands(family: TpmFamily) -> frozenset[bytes]:
    """Return the codes, as they stand in a packet, of the commands that may take long."""
    return frozenset(code.to_bytes(4) for code in (_LONG_20 if family is TpmFamily.TPM_2_0 else _LONG_12))


def growth(family: TpmFamily, code: int) -> int:
    """Return how many bytes the stored state may grow in a command, at most."""
    if family is TpmFamily.TPM_2_0:
        return _GROWTH_20.get(code, _UPDATE)
    return _GROWTH_12.get(code, MARGIN)


class Startup(Enum):
    """How a vTPM comes up; the value is what LoadReply carries."""

    CLEAR = "clear"
    STATE = "state"
    NONE = "none"  # the guest's firmware sends Startup itself
    DEACTIVATED = "deactivated"  # TPM 1.2 only: it comes up deactivated, and stays so until the next platform reset
    FAILED = "failed"  # an earlier instance crashed: answer failure until a platform reset


_TYPES_20: Final = {Startup.CLEAR: 0, Startup.STATE: 1}  # TPM_SU_*
_TYPES_12: Final = {Startup.CLEAR: 1, Startup.STATE: 2, Startup.DEACTIVATED: 3}  # TPM_ST_*

# CreateMaintenanceArchive, LoadMaintenanceArchive, KillMaintenanceFeature, LoadManuMaintPub, ReadManuMaintPub: what
# Xen's instance refuses without `maintcmds=1`. libtpms 0.9.2 has none of them; a later one may.
_MAINTENANCE_12: Final = (0x2C, 0x2D, 0x2E, 0x2F, 0x30)


def maintenance_commands(family: TpmFamily) -> frozenset[bytes]:
    """Return the codes, as they stand in a packet, of TPM 1.2's maintenance commands (Part 3, 12); 2.0 has none."""
    return frozenset(code.to_bytes(4) for code in _MAINTENANCE_12 if family is TpmFamily.TPM_1_2)


def code_of(packet: bytes) -> int:
    """Return the command or response code of a packet of at least 10 bytes."""
    return int.from_bytes(packet[CODE_OFFSET:CODE_END])


def startup(family: TpmFamily, kind: Startup) -> bytes:
    """Return TPM2_Startup or TPM_Startup of a kind (TPM 2.0 Part 3, 9.3; TPM 1.2 Part 3, 3.2).

    Raises:
        KeyError: NONE or FAILED, or DEACTIVATED of a TPM 2.0, which does not know it.

    """
    if family is TpmFamily.TPM_2_0:
        return command(TPM2_STARTUP, struct.pack(">H", _TYPES_20[kind]))
    return command(TPM12_STARTUP, struct.pack(">H", _TYPES_12[kind]), Tag.TPM12_REQUEST)


def shutdowns(family: TpmFamily) -> tuple[bytes, ...]:
    """Return what saves the volatile state before power off, best first: the next is for when one is refused."""
    if family is TpmFamily.TPM_2_0:
        return tuple(command(TPM2_SHUTDOWN, struct.pack(">H", kind)) for kind in (1, 0))
    return (command(TPM12_SAVE_STATE, tag=Tag.TPM12_REQUEST),)


def shutdown_code(family: TpmFamily) -> int:
    """Return the command code of TPM2_Shutdown or TPM_SaveState."""
    return TPM2_SHUTDOWN if family is TpmFamily.TPM_2_0 else TPM12_SAVE_STATE


def not_started_code(family: TpmFamily) -> int:
    """Return the response code that says that no Startup was sent."""
    return RC_INITIALIZE if family is TpmFamily.TPM_2_0 else TPM12_INVALID_POSTINIT


def stir_random(entropy: bytes) -> bytes:
    """Return TPM2_StirRandom with at most 128 bytes (TPM 2.0 Part 3, 16.2)."""
    return command(TPM2_STIR_RANDOM, struct.pack(">H", len(entropy)) + entropy)


def read_clock() -> bytes:
    """Return TPM2_ReadClock: refused with 0x100 exactly when the TPM was not started."""
    return command(TPM2_READ_CLOCK)
