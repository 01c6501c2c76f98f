"""What is said on a connection: TPM commands on the data channel, control commands beside it. Sans-IO.

What lives here: from bytes received to one answer at a time. What must not: sockets (`connection`), turns (`server`).
"""

from typing import Final, Protocol

from frontend_backend.descriptors import close_all
from frontend_backend.tpmhdr import HEADER_SIZE, ResponseCode, TpmFamily, error_response
from vtpm_instance import driver_locality
from vtpm_instance.control import ControlSession
from vtpm_instance.errors import FramingError
from vtpm_instance.framing import CommandStream, announced, with_prefix
from vtpm_instance.front_ends import Rules
from vtpm_instance.tpm_commands import CODE_END, CODE_OFFSET
from vtpm_instance.vtpm import Vtpm, failure_response, wrong_size_response

_CONTROL_BYTES: Final = 16 * 1024  # received at once on a control connection; a state blob comes in few pieces
_MAX_DESCRIPTORS: Final = 2  # kept of those that came along; one is asked for
# One for all: what lies in it is used at once, and by one thread at a time. Untouched pages take no memory.
_received: Final = bytearray(_CONTROL_BYTES)


PASSED: Final = 1  # note of a data connection that came by SET_DATAFD


class DataServer(Protocol):
    """Whose vTPM a data connection is for, and at which locality its commands run."""

    vtpm: Vtpm
    locality: int
    rules: Rules

    def set_locality(self, locality: int) -> int:
        """Use a locality from now on if that is allowed; returns 0, or why not."""


class DataSession:
    """One data connection: raw TPM commands in, raw responses out."""

    def __init__(self, server: DataServer) -> None:
        """Serve `server`'s vTPM at the locality the control channel has set."""
        self._server = server
        self.buffer = server.vtpm.commands
        self._execute, self._execute_placed = server.vtpm.execute, server.vtpm.execute_placed
        prefixes = server.rules.tcg_prefix and server.vtpm.family is TpmFamily.TPM_2_0
        self._stream = CommandStream(prefixes=prefixes)
        self.pending = self.closing = self.held = False
        self.note = 0  # PASSED where the connection came by SET_DATAFD

    def take_up(self, note: int) -> None:
        """Go on where another session was; between two commands there is nothing else to know."""
        self.note = note

    def end(self) -> None:
        """Nothing is kept that would have to be given back."""

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
            answer: bytes | None = wrong_size_response(self._server.vtpm.family)
        else:
            self.pending = self._stream.pending
            answer = None if command is None else self._answer(command)
        return answer if answer is None or self._stream.locality is None else with_prefix(answer)

    def _answer(self, command: bytes) -> bytes:
        server, locality = self._server, self._stream.locality
        if locality is not None and server.set_locality(locality):
            return error_response(server.vtpm.family, ResponseCode.LOCALITY)
        return self._execute(command, server.locality)


class SwtpmDataSession(DataSession):
    """One data connection of the command in swtpm's place: with its driver's command, and perhaps for one command."""

    def exchange(self, size: int) -> bytes | None:
        """Take what was received, then do as `next_answer`."""
        buffer = self.buffer
        whole = size >= HEADER_SIZE and announced(buffer)[0] == size and not self.pending  # see DataSession
        if whole and buffer[CODE_OFFSET:CODE_END] != driver_locality.PACKED:
            self.closing = self._server.rules.one_command
            return self._execute_placed(size, self._server.locality)
        self._stream.feed(buffer[:size])
        return self.next_answer()

    def next_answer(self) -> bytes | None:
        """Execute the next whole command."""
        answer = super().next_answer()
        self.closing = self.closing or (answer is not None and self._server.rules.one_command)
        return answer

    def _answer(self, command: bytes) -> bytes:
        if command[CODE_OFFSET:CODE_END] != driver_locality.PACKED:
            return super()._answer(command)
        if not self._server.rules.driver_sets_locality:
            return failure_response(self._server.vtpm.family)
        return driver_locality.answer(command, self._server.vtpm.family, self._server.set_locality)


class ControlPortSession(ControlSession):
    """One control connection; it ends when its peer closes it."""

    closing = False
    buffer = _received

    def exchange(self, size: int) -> bytes | None:
        """Take what was received, then do as `next_answer`."""
        executed = self.execute_whole(bytes(_received[:size]))
        if executed is not None:
            return executed[0]
        self.feed(_received[:size])
        return self.next_answer()

    def take_in(self, descriptors: list[int]) -> None:
        """Keep descriptors for the command they came with; more than one too many are not worth keeping."""
        self._descriptors += descriptors
        close_all(self._descriptors[_MAX_DESCRIPTORS:])
        del self._descriptors[_MAX_DESCRIPTORS:]

    def next_answer(self) -> bytes | None:
        """Execute the next whole command; descriptors that none has taken by then are closed."""
        answer = super().next_answer()
        if self._descriptors and not self.pending:
            close_all(self.left_over())
        return answer

    def end(self) -> None:
        """Close what is left over."""
        close_all(self.left_over())
