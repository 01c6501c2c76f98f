"""The control channel of swtpm, sans-IO: bytes and descriptors in, answers out, by the table of `control_table`.

What is known but not offered is answered with TPM_BAD_ORDINAL after its payload was read, so that the stream stays in
step. Source: reference/swtpm-libtpms-qemu.md 1.1-1.4.
"""

from collections.abc import Sequence
from typing import Final

from frontend_backend.tpmhdr import TpmFamily
from vtpm_instance.control_machine import Machine, Result
from vtpm_instance.control_table import FIXED, NUMBER, TABLE, Body, Command, Entry, Layout, capabilities, refused_body
from vtpm_instance.front_ends import FrontEnd, Role

__all__ = ["NUMBER", "TABLE", "Command", "ControlSession", "Entry", "FrontEnd", "Layout", "Machine", "Result", "Role"]
__all__ += ["capabilities"]

_WORD: Final = 4  # bytes of a command number, result or length
_PADDING: Final = 3  # bytes QEMU sends after a one-byte locality
_MAY_PAD, _IS_PLATFORM = 1, 2  # bits of a note
_ZEROS_SHIFT: Final = 2  # above them: how many zero bytes have come that are padding or the begin of a command


class ControlSession:
    """One control connection: feed bytes, take answers. A command waits until its last payload byte is there.

    Descriptors that came along are kept until SET_DATAFD takes one, or nothing more is pending: see `left_over`.
    """

    def __init__(
        self, front_end: FrontEnd, role: Role, machine: Machine, family: TpmFamily = TpmFamily.TPM_2_0
    ) -> None:
        """Serve a peer in `role`, acting on `machine`, whose TPM is of `family`."""
        self.front_end, self.role, self.machine, self.family = front_end, role, machine, family
        self._buffer = bytearray()
        self._descriptors: list[int] = []
        self._body: Body | None = None
        self._may_pad = False
        self._blob: tuple[int, int, tuple[int, int, bytes]] | None = None
        self.is_platform = False
        self.held = False  # a whole command waits until the vTPM is not busy

    def feed(self, data: bytes | bytearray, descriptors: Sequence[int] = ()) -> None:
        """Add what was received."""
        self._buffer += data
        self._descriptors += descriptors

    @property
    def pending(self) -> bool:
        """Whether bytes are there that no answer was given to, or a body is still to come.

        Zero bytes after a locality are not: a note holds them. QEMU leaves its padding there until its next command.
        """
        return bool(self._body or (self._buffer and not self._zeros))

    @property
    def _zeros(self) -> int:
        """How many zero bytes have come after a locality, 0 to 3, when there is nothing else."""
        maybe = self._may_pad and len(self._buffer) <= _PADDING and not any(self._buffer)
        return len(self._buffer) if maybe else 0

    @property
    def note(self) -> int:
        """What the next session on the same connection has to know, when nothing is pending: see `take_up`."""
        return _MAY_PAD * self._may_pad | _IS_PLATFORM * self.is_platform | self._zeros << _ZEROS_SHIFT

    def take_up(self, note: int) -> None:
        """Go on where the session was that had this note."""
        self._may_pad, self.is_platform = bool(note & _MAY_PAD), bool(note & _IS_PLATFORM)
        self._buffer = bytearray(note >> _ZEROS_SHIFT)

    def next_answer(self) -> bytes | None:
        """Execute the next whole command and return its answer, or None until more is fed."""
        if self._body is not None:
            return self._go_on_with_body(self._body)
        if not self._drop_padding():
            return None
        if len(self._buffer) < _WORD:
            return None
        number = NUMBER.unpack_from(self._buffer)[0]
        try:
            entry = TABLE[Command(number)]
        except ValueError:
            # Its payload's length is unknown: like swtpm, take what came with it.
            self._buffer.clear()
            return NUMBER.pack(Result.BAD_ORDINAL)
        end = _WORD + entry.layout.fixed
        whole = len(self._buffer) >= end
        self.held = whole and entry.alone and self.machine.busy
        if self.held or not whole:
            return None
        return self._execute(entry, self._take(end)[_WORD:])

    def execute_whole(self, request: bytes) -> tuple[bytes | None] | None:
        """Execute what was received in one piece, if it is one command and nothing came before; else return None.

        This is how nearly all of them come; what `feed` and `next_answer` do beyond it costs as much again.
        """
        if self._buffer or self._may_pad or self._body is not None or self._descriptors:
            return None
        entry = FIXED.get(request[:_WORD])
        if entry is None or (entry.alone and self.machine.busy):
            return None
        if len(request) != _WORD + entry.layout.fixed:  # padding may be a part of the next one
            return None
        return (self._execute(entry, request[_WORD:]),)

    def _execute(self, entry: Entry, payload: bytes) -> bytes | None:
        self._may_pad = entry.layout.padded
        allowed = (self.front_end, self.role) in entry.allowed and (self.machine.running or not entry.running)
        if entry.layout.counted_at is not None:
            left = NUMBER.unpack_from(payload, entry.layout.counted_at)[0]
            begin = entry.begin if allowed else None
            self._body = refused_body(entry, left) if begin is None else begin(self, payload, left)
            return self._go_on_with_body(self._body)
        if entry.handler is None or not allowed:
            return entry.refusal(Result.BAD_ORDINAL)
        return entry.handler(self, payload)

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _go_on_with_body(self, body: Body) -> bytes | None:
        self.held = body.alone and self.machine.busy and bool(self._buffer or not body.left)
        if self.held:
            return None
        piece = self._take(body.left)
        body.left -= len(piece)
        if piece:
            body.take(piece)
        if body.left:
            return None
        self._body = None
        return body.finish()

    def _drop_padding(self) -> bool:
        """Remove the bytes QEMU sends after a locality; returns False while more must come to tell.

        Command numbers start with three zero bytes and a fourth that is not; padding is three bytes, and those that
        come in one piece with their command may hold anything.
        """
        if not self._may_pad or not self._buffer:
            return True
        if len(self._buffer) == _PADDING and any(self._buffer):
            self._take(_PADDING)
        elif len(self._buffer) < _WORD:
            return False
        elif not any(self._buffer[:_WORD]) or any(self._buffer[:_PADDING]):
            self._take(_PADDING)
        self._may_pad = False
        return True

    # Conversation: what handlers need

    def take_descriptor(self) -> int | None:
        """Return the one descriptor that came along; None, and all that did are left over, if that is not one."""
        return self._descriptors.pop() if len(self._descriptors) == 1 else None

    def left_over(self) -> list[int]:
        """Return descriptors nobody wants any more; they are the caller's then."""
        descriptors, self._descriptors = self._descriptors, []
        return descriptors

    def blob(self, kind: int, flags: int, offset: int) -> tuple[int, int, bytes]:
        """Return a whole state blob; who reads on from an offset gets pieces of the one that was begun."""
        if offset and self._blob is not None and self._blob[:2] == (kind, flags):
            return self._blob[2]
        found = self.machine.get_blob(kind, flags)
        self._blob = None if found[0] else (kind, flags, found)
        return found
