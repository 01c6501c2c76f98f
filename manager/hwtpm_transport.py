"""Bytes to and from a hardware TPM: one command, one response, with a deadline. No tpm2_pytss, no policy.

Failures of sockets and descriptors leave as they are (OSError, TimeoutError at the deadline): the owner knows what was
being done and says so. A transport that raised is finished: a late reply would answer the wrong command.
"""

import os
import select
import socket
import struct
import time
from typing import Final, Protocol

from manager.hwtpm_errors import BadSetting, TpmTransport, WrongLocality
from manager.hwtpm_setting import TctiKind, TctiSetting

# Part 1, 18: tag u16, size u32, code u32.
HEADER: Final = struct.Struct(">HII")
assert HEADER.size == 10, "TPM 2.0 Part 1, 18.1: command and response header"
MAX_RESPONSE: Final = 4096  # MAX_RESPONSE_SIZE of libtpms; chips have less
# swtpm's control channel, tpm_ioctl.h: CMD_SET_LOCALITY, then u8 locality; the answer is a u32 result.
SET_LOCALITY: Final = struct.Struct(">IB")
CMD_SET_LOCALITY: Final = 5
CONTROL_RESULT: Final = struct.Struct(">I")


class Transport(Protocol):
    """What the TSS adapter needs. Deadlines are values of time.monotonic()."""

    owns_handles: bool
    """True if every transient handle in the TPM is ours, so that strays of a crashed owner may be flushed."""
    localities: tuple[int, ...]
    """Localities this transport can ask for."""

    def exchange(self, command: bytes, deadline: float) -> bytes:
        """Send one whole command, return one whole response. Raises OSError, TimeoutError, TpmTransport."""

    def set_locality(self, locality: int, deadline: float) -> None:
        """Be at this locality from the next command on. Raises WrongLocality, OSError, TimeoutError."""

    def close(self) -> None:
        """Give the TPM back. Never raises for a connection that is broken already."""


def check_response(response: bytes) -> bytes:
    """Return the response if its header is whole and tells its true length. Raises TpmTransport."""
    if len(response) < HEADER.size or HEADER.unpack_from(response)[1] != len(response):
        raise TpmTransport("read a response", f"{len(response)} bytes with a header that does not fit them")
    return response


class SwtpmTransport:
    """swtpm's data and control channels, Unix or TCP. Holding both keeps every other client out.

    That matters: swtpm's locality belongs to the process, and any other control client may change it.
    """

    def __init__(self, setting: TctiSetting, deadline: float) -> None:
        self.owns_handles = True
        self.localities: tuple[int, ...] = (0, 1, 2, 3, 4)
        self._control = _connect(setting, deadline, control=True)
        try:
            self._data = _connect(setting, deadline, control=False)
        except BaseException:
            self._control.close()
            raise

    def exchange(self, command: bytes, deadline: float) -> bytes:
        """See Transport."""
        self._data.settimeout(_left(deadline))
        self._data.sendall(command)
        head = _receive(self._data, HEADER.size, deadline)
        length = HEADER.unpack(head)[1]
        if not HEADER.size <= length <= MAX_RESPONSE:
            raise TpmTransport("read a response", f"its header tells {length} bytes")
        return head + _receive(self._data, length - HEADER.size, deadline)

    def set_locality(self, locality: int, deadline: float) -> None:
        """See Transport."""
        self._control.settimeout(_left(deadline))
        self._control.sendall(SET_LOCALITY.pack(CMD_SET_LOCALITY, locality))
        (result,) = CONTROL_RESULT.unpack(_receive(self._control, CONTROL_RESULT.size, deadline))
        if result:
            raise WrongLocality(locality, f"swtpm's control channel answered 0x{result:x}")

    def close(self) -> None:
        """See Transport."""
        self._data.close()
        self._control.close()


class DeviceTransport:
    """A character device of the kernel: /dev/tpmrm0 or /dev/tpm0. Always locality 0."""

    def __init__(self, path: str) -> None:
        # tpmrm0 gives each open file handles of its own. tpm0 can be open once only, so strays are of a dead owner.
        self.owns_handles = not os.path.basename(path).startswith("tpmrm")
        self.localities: tuple[int, ...] = (0,)
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)

    def exchange(self, command: bytes, deadline: float) -> bytes:
        """See Transport. The kernel takes and gives whole packets (Documentation: tpm0, O_NONBLOCK since 4.20)."""
        if os.write(self._fd, command) != len(command):
            raise TpmTransport("send a command", "the device took only a part of it")
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(_left(deadline) * 1000):
            raise TimeoutError
        return os.read(self._fd, MAX_RESPONSE)

    def set_locality(self, locality: int, deadline: float) -> None:  # noqa: ARG002 - the protocol's shape
        """See Transport."""
        if locality:
            raise WrongLocality(locality, "the kernel's driver gives locality 0 only")

    def close(self) -> None:
        """See Transport."""
        os.close(self._fd)


def _connect(setting: TctiSetting, deadline: float, *, control: bool) -> socket.socket:
    unix = setting.kind is TctiKind.SWTPM_PATH
    address: str | tuple[str, int]
    address = setting.path + (".ctrl" if control else "") if unix else (setting.host, setting.port + control)
    client = socket.socket(socket.AF_UNIX if unix else socket.AF_INET, socket.SOCK_STREAM)
    try:
        client.settimeout(_left(deadline))
        client.connect(address)
        if not unix:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        client.close()
        raise
    return client


def _receive(client: socket.socket, length: int, deadline: float) -> bytes:
    chunks = bytearray()
    while len(chunks) < length:
        client.settimeout(_left(deadline))
        chunk = client.recv(length - len(chunks))
        if not chunk:
            raise ConnectionResetError("swtpm closed the connection")
        chunks += chunk
    return bytes(chunks)


def _left(deadline: float) -> float:
    """Seconds to the deadline; raises TimeoutError at it (a zero timeout would mean something else)."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def connect(setting: TctiSetting, deadline: float) -> SwtpmTransport | DeviceTransport:
    """Open the transport of a setting that needs no tss2 loader. Raises OSError, TimeoutError, BadSetting."""
    match setting.kind:
        case TctiKind.SWTPM_PATH | TctiKind.SWTPM_TCP:
            return SwtpmTransport(setting, deadline)
        case TctiKind.DEVICE:
            return DeviceTransport(setting.path)
        case TctiKind.EMBEDDED | TctiKind.LOADER | TctiKind.TIS | TctiKind.CRB:
            raise BadSetting(f"{setting.text!r} has no transport of its own", "Start EmbeddedTpm and use its setting.")
