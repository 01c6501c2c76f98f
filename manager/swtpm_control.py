"""The few things the command in swtpm's place asks of its vTPM by itself: what it is, power on and off, startup.

Source: swtpm's tpm_ioctl.h; reference/swtpm-libtpms-qemu.md 1.3.
"""

import json
import socket
import struct
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Final

from manager.errors import BusyError, ConflictError, DeniedError, ManagerError, NotFoundError

CONTROL: Final = "swtpm.sock.ctrl"
DATA: Final = "swtpm.sock"
_SECONDS: Final = 120.0  # that an answer may take: a hibernated vTPM wakes first, a busy one ends its command
_WORD: Final = struct.Struct(">I")
_TWO: Final = struct.Struct(">II")
_INFO: Final = struct.Struct(">QII")  # flags, offset, padding
_SPECIFICATION: Final = 1  # flag of GET_INFO
_ANSWER_MOST: Final = 4096
# TPM2_Startup (Part 3, 9.3) and TPM_Startup (Part 3, 3.2): header, then the startup type
_STARTUPS: Final = {
    ("2.0", "clear"): bytes.fromhex("80010000000c000001440000"),
    ("2.0", "state"): bytes.fromhex("80010000000c000001440001"),
    ("1.2", "clear"): bytes.fromhex("00c10000000c000000990001"),
    ("1.2", "state"): bytes.fromhex("00c10000000c000000990002"),
    ("1.2", "deactivated"): bytes.fromhex("00c10000000c000000990003"),
}


class Ask(IntEnum):
    """Commands that are sent from here (CMD_*)."""

    GET_CAPABILITY = 0x01
    INIT = 0x02
    STOP = 0x0E
    GET_INFO = 0x12


class Capability(IntFlag):
    """Bits of GET_CAPABILITY's answer that are looked at (PTM_CAP_*)."""

    SET_DATAFD = 1 << 12


def connect(folder: Path, name: str) -> socket.socket:
    """Connect to a socket of a vTPM's folder.

    Raises:
        NotFoundError: it is not attached. DeniedError: its sockets are another user's. BusyError: nobody takes us.

    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(_SECONDS)
        sock.connect(str(folder / name))
    except OSError as error:
        sock.close()
        if isinstance(error, FileNotFoundError):
            raise NotFoundError(
                f"vTPM {folder.name} is not attached (or its socket was removed): there is no {folder / name}"
            ) from error
        if isinstance(error, PermissionError):
            raise DeniedError(
                f"vTPM {folder.name} was not given to this user: only the owner of {folder / name} may use it "
                f"(an operator says who that is: vtpm-attach --frontend qemu --owner USER)"
            ) from error
        raise BusyError(
            f"nobody serves {folder / name} ({error.strerror or error}): is its manager stopped?"
        ) from error
    return sock


def ask(folder: Path, number: int, payload: bytes = b"") -> bytes:
    """Send one control command on a connection of its own; return what comes behind the result, which is 0.

    Raises:
        ManagerError: the result is another, or the connection ended. And what `connect` raises.

    """
    with connect(folder, CONTROL) as sock:
        try:
            sock.sendall(_WORD.pack(number) + payload)
            answer = sock.recv(_ANSWER_MOST)
        except OSError as error:
            raise ManagerError(f"vTPM {folder.name} gave no answer on its control channel: {error}") from error
    if len(answer) < _WORD.size:
        raise ManagerError(f"vTPM {folder.name} ended the control connection; look at the manager's log")
    (result,) = _WORD.unpack_from(answer)
    if result:
        raise ManagerError(f"vTPM {folder.name} refused control command {number:#x} with result {result:#x}")
    return answer[_WORD.size :]


def family_of(folder: Path) -> str:
    """Return "2.0" or "1.2". Raises what `ask` does."""
    answer = ask(folder, Ask.GET_INFO, _INFO.pack(_SPECIFICATION, 0, 0))
    text = answer[_TWO.size :].rstrip(b"\0")
    try:
        return str(json.loads(text)["TPMSpecification"]["family"])
    except (ValueError, KeyError, TypeError) as error:
        raise ManagerError(f"vTPM {folder.name} does not say what it is: {text[:80]!r}") from error


def check(folder: Path, *, tpm2: bool) -> str:
    """Check that a vTPM is attached for us and QEMU, and of the family that the command line says; return that.

    Raises:
        ConflictError: it is not. And what `ask` raises.

    """
    (bits,) = _WORD.unpack_from(ask(folder, Ask.GET_CAPABILITY))
    if not bits & Capability.SET_DATAFD:
        raise ConflictError(
            f"vTPM {folder.name} is attached, but not with front end qemu, or for another user: detach it and attach "
            f"it again with 'vtpm-attach {folder.name} GUEST --frontend qemu --owner USER'"
        )
    family = family_of(folder)
    if (family == "2.0") != tpm2:
        says = "2.0 (--tpm2)" if tpm2 else "1.2 (no --tpm2)"
        raise ConflictError(f"vTPM {folder.name} is a TPM {family}, the command line says {says}; nothing was started")
    return family


def power_on(folder: Path) -> None:
    """Switch a vTPM on (INIT). Raises what `ask` does."""
    ask(folder, Ask.INIT, _WORD.pack(0))


def power_off(folder: Path) -> None:
    """Switch a vTPM off (STOP), saving what its guest did not. Raises what `ask` does."""
    ask(folder, Ask.STOP)


def start_up(folder: Path, family: str, kind: str) -> None:
    """Send the TPM its Startup.

    Raises:
        ManagerError: it did not take it. And what `connect` raises.

    """
    with connect(folder, DATA) as sock:
        try:
            sock.sendall(_STARTUPS[family, kind])
            answer = sock.recv(_ANSWER_MOST)
        except OSError as error:
            raise ManagerError(f"vTPM {folder.name} gave no answer to its Startup: {error}") from error
    code = int.from_bytes(answer[6:10])
    if len(answer) < 10 or code:
        raise ManagerError(f"vTPM {folder.name} did not start up ({kind}): response code {code:#x}")
