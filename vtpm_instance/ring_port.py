"""The front end `ring`: programs connect, get a ring of their own, and submit TPM commands on it.

A page is shared with a program that may be hostile; `BackRing` copies each request out once. Several rings may be
open; commands are still executed one at a time, by the one loop.
"""

import socket
from typing import Final

from frontend_backend.descriptors import send_message
from frontend_backend.local import LocalRing
from frontend_backend.ring import Answered, BackRing, Request
from frontend_backend.tpmhdr import TpmFamily, error_response
from frontend_backend.tpmif import MAX_PACKET
from vtpm_instance.framing import is_whole_command
from vtpm_instance.vtpm import Vtpm, wrong_size_response

MAX_RINGS: Final = 8  # more wait in the listener's backlog
_GREETING: Final = b"ring"  # the datagram that carries the descriptors; its content says nothing
# TPM_RC_LOCALITY (TPM 2.0 Part 2, 6.6.3) and TPM_BAD_LOCALITY (TPM 1.2 Part 2, 16)
_BAD_LOCALITY: Final = {TpmFamily.TPM_2_0: 0x107, TpmFamily.TPM_1_2: 0x3D}
# An answer of up to 4096 bytes that does not fit a page (TPM_NV_ReadValue can ask for one): TPM_RC_SIZE and TPM_SIZE.
_TOO_LONG: Final = {TpmFamily.TPM_2_0: 0x95, TpmFamily.TPM_1_2: 0x17}


class ServedRing:
    """The back end of one ring."""

    def __init__(self, ring: LocalRing, vtpm: Vtpm) -> None:
        """Answer what comes over `ring`, which becomes ours."""
        self._ring, self._vtpm = ring, vtpm
        self._back = BackRing(ring.page, lambda _why: wrong_size_response(vtpm.family))

    def fileno(self) -> int:
        """Return the doorbell's descriptor."""
        return self._ring.fileno()

    def on_doorbell(self) -> bool:
        """Answer what has been submitted; returns False once the peer is gone."""
        alive = self._ring.drain()
        match self._back.take():
            case Request(packet, locality):
                self._back.finish(self._answer(packet, locality))
                self._ring.ring()
            case Answered():
                self._ring.ring()
            case None:
                pass
        return alive

    def _answer(self, packet: bytes, locality: int) -> bytes:
        if not is_whole_command(packet):
            return wrong_size_response(self._vtpm.family)
        if locality != 0:
            return error_response(self._vtpm.family, _BAD_LOCALITY[self._vtpm.family])
        answer = self._vtpm.execute(packet, locality)
        if len(answer) > MAX_PACKET:
            return error_response(self._vtpm.family, _TOO_LONG[self._vtpm.family])
        return answer

    def close(self) -> None:
        """Close the ring."""
        self._ring.close()


class RingPort:
    """A SEQPACKET listener that hands a new ring to each program that connects."""

    def __init__(self, listener: socket.socket, vtpm: Vtpm) -> None:
        """Take `listener` over."""
        self._listener, self._vtpm = listener, vtpm
        self._listener.setblocking(False)
        self.rings: dict[int, ServedRing] = {}

    def fileno(self) -> int:
        """Return the listener's descriptor."""
        return self._listener.fileno()

    @property
    def full(self) -> bool:
        """Whether no more rings are made for now."""
        return len(self.rings) >= MAX_RINGS

    def accept(self) -> ServedRing | None:
        """Make a ring for one waiting program, None when there is none any more.

        Raises:
            OSError: out of descriptors or memory; the program still waits.

        """
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        with sock:
            sock.setblocking(False)
            try:
                front, back = LocalRing.pair()
            except OSError:
                return None  # out of descriptors or memory: the program sees its connection end, and may ask again
            with front:
                try:
                    send_message(sock, _GREETING, front.descriptors())
                except OSError:
                    # Who asked for a ring is gone. No line in the log: a guest could fill it that way.
                    back.close()
                    return None
        served = ServedRing(back, self._vtpm)
        self.rings[served.fileno()] = served
        return served

    def close(self) -> None:
        """Close everything."""
        for ring in self.rings.values():
            ring.close()
        self.rings.clear()
        self._listener.close()
