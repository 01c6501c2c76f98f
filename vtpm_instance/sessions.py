"""What is said on a connection: TPM commands on the data channel, control commands beside it. Sans-IO.

What lives here: from bytes received to one answer at a time. What must not: sockets (`connection`), turns (`server`).
"""

from typing import Final, Protocol

from frontend_backend.tpmhdr import HEADER_SIZE
from vtpm_instance.control import ControlSession, FrontEnd, Machine, Role
from vtpm_instance.errors import FramingError
from vtpm_instance.framing import CommandStream, announced
from vtpm_instance.vtpm import Vtpm, wrong_size_response

_CONTROL_BYTES: Final = 1024  # received at once on a control connection; requests have a few dozen


class DataServer(Protocol):
    """Whose vTPM a data connection is for, and at which locality its commands run."""

    vtpm: Vtpm
    locality: int


class DataSession:
    """One data connection: raw TPM commands in, raw responses out."""

    def __init__(self, server: DataServer) -> None:
        """Serve `server`'s vTPM at the locality the control channel has set."""
        self._server = server
        self.buffer = server.vtpm.commands
        self._execute, self._execute_placed = server.vtpm.execute, server.vtpm.execute_placed
        self._stream = CommandStream()
        self.pending = self.closing = self.held = False
        self.note = 0

    def take_up(self, note: int) -> None:
        """Go on where another session was; between two commands there is nothing to know."""

    def exchange(self, size: int) -> bytes | None:
        """Take what was received, then do as `next_answer`."""
        if size >= HEADER_SIZE and announced(self.buffer)[0] == size and not self.pending:
            # as nearly always: one whole command, and it lies where libtpms takes it from
            return self._execute_placed(size, self._server.locality)
        self._stream.feed(self.buffer[:size])
        return self.next_answer()

    def next_answer(self) -> bytes | None:
        """Execute the next whole command; one with an impossible size is answered and ends the connection."""
        try:
            command = self._stream.next_command()
        except FramingError:
            self.closing = True
            return wrong_size_response(self._server.vtpm.family)
        self.pending = self._stream.pending
        return None if command is None else self._execute(command, self._server.locality)


class ControlPortSession(ControlSession):
    """One control connection; it ends when its peer closes it."""

    closing = False

    def __init__(self, front_end: FrontEnd, role: Role, machine: Machine) -> None:
        """Serve a peer in `role`, acting on `machine`."""
        super().__init__(front_end, role, machine)
        self.buffer = bytearray(_CONTROL_BYTES)

    def exchange(self, size: int) -> bytes | None:
        """Take what was received, then do as `next_answer`."""
        self.feed(bytes(self.buffer[:size]))
        return self.next_answer()
