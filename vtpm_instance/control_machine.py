"""What control commands act on, and the numbers they are answered with. Protocols only.

Source: swtpm's tpm_ioctl.h and ctrlchannel.c; reference/swtpm-libtpms-qemu.md 1.2-1.4.
"""

from enum import IntEnum, IntFlag
from typing import Protocol


class Result(IntEnum):
    """Results, TPM 1.2 numbers for both families; libtpms' own codes pass through beside them."""

    SUCCESS = 0x00
    BAD_PARAMETER = 0x03
    FAIL = 0x09
    BAD_ORDINAL = 0x0A  # unknown, not allowed, or not in this state
    KEY_NOT_FOUND = 0x0D
    SIZE = 0x17
    IO_ERROR = 0x1F
    DECRYPT_ERROR = 0x21
    BAD_KEY_PROPERTY = 0x28
    BAD_DATASIZE = 0x2B
    BAD_VERSION = 0x2E
    BAD_TYPE = 0x34
    BAD_LOCALITY = 0x3D
    RETRY = 0x800  # there is no such blob: not fatal to QEMU


class BlobKind(IntEnum):
    """Types of state blobs (PTM_BLOB_TYPE_*)."""

    PERMANENT = 1
    VOLATILE = 2
    SAVED = 3


class BlobFlags(IntFlag):
    """Flags of requests and replies (PTM_STATE_FLAG_*)."""

    DECRYPTED = 1  # request: not wrapped with the key of the stored files
    ENCRYPTED = 2  # reply: wrapped with it


class InitFlags(IntFlag):
    """Flags of INIT (PTM_INIT_FLAG_*)."""

    DELETE_VOLATILE = 1


class StateBlobs(Protocol):
    """Gives a vTPM's state out and takes one in; one of these is handed to `Server`. Results are as in `Machine`."""

    @property
    def staged(self) -> bool:
        """Whether `put_in` was accepted, so that the next power on starts from it."""

    def take_out(self, kind: int, flags: int) -> tuple[int, int, bytes]:
        """Return (result, reply flags, whole blob); asked only while the vTPM runs. RETRY where there is none."""

    def put_in(self, kind: int, flags: int, data: bytes) -> int:
        """Take a blob in; asked only while the vTPM is powered off."""

    def used(self) -> None:
        """Do what comes before the first command (or HASH_*) after a `take_out`, also where INIT or STOP came between.

        Raises what a commit raises.
        """

    def forget(self) -> None:
        """Drop what was put in: the platform was switched off before it was used."""

    @property
    def newest(self) -> bool:
        """Whether what is staged is the state that counts already: then it is saved by `used`, not by the power on."""

    def take_staged(self) -> dict[str, bytes]:
        """Return what was put in by libtpms' names (permall, volatilestate, savestate), and forget it."""


class Machine(Protocol):
    """What control commands act on. Results are `Result`, or libtpms' code."""

    @property
    def running(self) -> bool:
        """Whether the TPM is powered on and well."""

    @property
    def busy(self) -> bool:
        """Whether a TPM command runs while this is asked: what needs the TPM has to wait then."""

    def power_on(self, flags: int) -> int:
        """INIT: switch the TPM on, or reset its platform where it is on."""

    def power_off(self) -> int:
        """STOP: save what the guest did not, switch off. May be repeated."""

    def shutdown(self) -> int:
        """SHUTDOWN: as STOP; the process ends where it is there for this TPM's user alone."""

    def set_locality(self, locality: int) -> int:
        """Use `locality` (0 to 255) for the data channel."""

    def cancel(self) -> bool:
        """Have the TPM command that runs give up, if there is one; returns False where that cannot be done."""

    def established(self) -> tuple[int, int]:
        """Return (result, TPM established bit)."""

    def reset_established(self, locality: int) -> int:
        """Clear the TPM established bit at `locality`."""

    def hash_start(self) -> int:
        """Begin a dynamic (or, before Startup, static) root of trust's measurement."""

    def hash_data(self, data: bytes) -> int:
        """Go on with it."""

    def hash_end(self) -> int:
        """End it, and extend the PCR."""

    def store_volatile(self) -> int:
        """Store the volatile state for the next power on."""

    def get_blob(self, kind: int, flags: int) -> tuple[int, int, bytes]:
        """Return (result, reply flags, whole blob)."""

    def set_blob(self, kind: int, flags: int, data: bytes) -> int:
        """Take a state blob in, to start from at the next power on."""

    def config(self) -> int:
        """Return which blobs are encrypted (`Keeper.config`)."""

    def info(self, flags: int) -> tuple[int, bytes]:
        """Return (result, libtpms' JSON text with its trailing zero byte)."""

    def buffer_size(self, wanted: int) -> tuple[int, int, int, int]:
        """Return (result, size, smallest, largest) of the command buffer in bytes; `wanted` above 0 sets it."""

    def take_data_descriptor(self, descriptor: int) -> int:
        """Use a passed socket as data connection; the descriptor is the machine's, whatever happens."""

    def lock_storage(self, retries: int) -> int:
        """Take the lock on the stored state back after it was given up for a migration."""
