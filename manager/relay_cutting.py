"""Requests and answers of swtpm's two channels, sans-IO: where one ends, and what is said instead of an answer.

A relay carries requests whole: it has to know which of them were executed. What they mean is the vTPM's affair, but
for three: SET_DATAFD brings a descriptor, SET_LOCALITY is said again after a restart, and which of the others may be
said twice (`repeatable`). Source: swtpm's tpm_ioctl.h; reference/swtpm-libtpms-qemu.md 1.3, 1.7.
"""

import struct
from dataclasses import dataclass
from typing import Final

from frontend_backend.tpmhdr import HEADER_SIZE, MAX_COMMAND, ResponseCode, Tag, TpmFamily, error_response
from manager.relay_errors import StreamCutError

_U32: Final = struct.Struct(">I")
_WORD: Final = _U32.size
_PADDING: Final = 3  # bytes QEMU sends after a one-byte locality
MAX_BODY: Final = 512 * 1024  # bytes of a state blob, swtpm's own limit
_FAIL: Final = 0x09  # TPM_FAIL, on the control channel for both families

INIT, SET_LOCALITY, SET_DATAFD = 0x02, 0x05, 0x10


@dataclass(frozen=True, slots=True)
class Form:
    """One control command: `fixed` bytes after its number, then as many as the u32 at `counted_at` of them says.

    `padded`: up to 3 bytes more. Its answer has `answer` bytes where it succeeds, then as many as the u32 at
    `answer_counted_at` says. `repeatable`: saying it twice is the same as once. `whole_failure`: QEMU reads `answer`
    bytes also of a failure.
    """

    fixed: int = 0
    counted_at: int | None = None
    padded: bool = False
    answer: int = _WORD
    answer_counted_at: int | None = None
    repeatable: bool = False
    whole_failure: bool = False


FORMS: Final[dict[int, Form]] = {
    0x01: Form(answer=8, repeatable=True, whole_failure=True),  # GET_CAPABILITY
    INIT: Form(4),
    0x03: Form(),  # SHUTDOWN
    0x04: Form(answer=8, repeatable=True, whole_failure=True),  # GET_TPMESTABLISHED
    SET_LOCALITY: Form(1, padded=True, repeatable=True),
    0x06: Form(),  # HASH_START
    0x07: Form(4, counted_at=0),  # HASH_DATA
    0x08: Form(),  # HASH_END
    0x09: Form(),  # CANCEL_TPM_CMD
    0x0A: Form(),  # STORE_VOLATILE
    0x0B: Form(1, padded=True, repeatable=True),  # RESET_TPMESTABLISHED
    0x0C: Form(12, answer=16, answer_counted_at=12, whole_failure=True),  # GET_STATEBLOB
    0x0D: Form(12, counted_at=8),  # SET_STATEBLOB
    0x0E: Form(repeatable=True),  # STOP
    0x0F: Form(answer=8, repeatable=True),  # GET_CONFIG
    SET_DATAFD: Form(),
    0x11: Form(4, answer=16, repeatable=True, whole_failure=True),  # SET_BUFFERSIZE
    0x12: Form(16, answer=12, answer_counted_at=8, repeatable=True),  # GET_INFO
    0x13: Form(4, repeatable=True),  # LOCK_STORAGE
}
_UNKNOWN: Final = Form()


def number_of(request: bytes) -> int:
    """Return the number of a control command."""
    number: int = _U32.unpack_from(request)[0]
    return number


def form_of(request: bytes) -> Form:
    """Return the form of a control command; of an unknown one that of the simplest."""
    return FORMS.get(number_of(request), _UNKNOWN)


def locality_of(request: bytes) -> int:
    """Return what a SET_LOCALITY asks for."""
    return request[_WORD]


def set_locality(locality: int) -> bytes:
    """Return the request for a locality."""
    return _U32.pack(SET_LOCALITY) + bytes([locality])


def succeeded(answer: bytes | bytearray) -> bool:
    """Tell whether a control command's answer says that it was done."""
    return len(answer) >= _WORD and _U32.unpack_from(answer)[0] == 0


class ControlCutter:
    """Cuts what a client says on the control channel into requests."""

    def __init__(self) -> None:
        """Start with nothing received."""
        self._buffer = b""
        self._may_pad = False

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data

    def next(self) -> bytes | None:
        """Return the next whole request without its padding, None until more is fed.

        Raises:
            StreamCutError: its body is too long; what comes after it cannot be read.

        """
        if not self._drop_padding() or len(self._buffer) < _WORD:
            return None
        if number_of(self._buffer) not in FORMS:
            # the length of its payload is unknown: like swtpm, take what came with it
            request, self._buffer = self._buffer, b""
            return request
        form = form_of(self._buffer)
        size = _WORD + form.fixed
        if len(self._buffer) < size:
            return None
        if form.counted_at is not None:
            body = _U32.unpack_from(self._buffer, _WORD + form.counted_at)[0]
            if body > MAX_BODY:
                raise StreamCutError(f"a body of {body} bytes; at most {MAX_BODY} are carried")
            size += body
            if len(self._buffer) < size:
                return None
        request, self._buffer = self._buffer[:size], self._buffer[size:]
        self._may_pad = form.padded
        return request

    def _drop_padding(self) -> bool:
        """Remove what QEMU sends after a locality; returns False while more must come to tell.

        Command numbers begin with three zero bytes and a fourth that is not; padding is three bytes.
        """
        if not self._may_pad or not self._buffer:
            return True
        if len(self._buffer) < _WORD and not (len(self._buffer) == _PADDING and any(self._buffer)):
            return False
        if not any(self._buffer[:_WORD]) or any(self._buffer[:_PADDING]):
            self._buffer = self._buffer[_PADDING:]
        self._may_pad = False
        return True


class DataCutter:
    """Cuts what a client says on the data channel into TPM commands, each with its TCG prefix where it has one."""

    def __init__(self) -> None:
        """Start with nothing received."""
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data

    def next(self) -> bytes | None:
        """Return the next whole command, None until more is fed.

        Raises:
            StreamCutError: its size cannot be; nothing after it can be read either.

        """
        if len(self._buffer) < HEADER_SIZE:
            return None
        before = PREFIX.size if has_prefix(self._buffer) else 0
        size = PREFIX.unpack_from(self._buffer)[2] if before else _U32.unpack_from(self._buffer, 2)[0]
        if not HEADER_SIZE <= size <= MAX_COMMAND:
            raise StreamCutError(f"a TPM command of {size} bytes")
        if len(self._buffer) < before + size:
            return None
        command, self._buffer = self._buffer[: before + size], self._buffer[before + size :]
        return command


def is_one(request: bytes, *, control: bool) -> bool:
    """Tell whether these bytes are one whole request and nothing else: a peer may say anything."""
    cutter = ControlCutter() if control else DataCutter()
    cutter.feed(request)
    try:
        return cutter.next() == request
    except StreamCutError:
        return False


PREFIX: Final = struct.Struct(">IBI")  # 8 (TPM_SEND_COMMAND), locality, size: of mssim's clients
assert PREFIX.size == 9
_SEND_COMMAND: Final = 8
_AFTER: Final = _WORD  # bytes of zero after an answer to one with a prefix


def has_prefix(command: bytes) -> bool:
    """Tell whether a command has the TCG prefix."""
    return number_of(command) == _SEND_COMMAND


def answer_size(request: bytes, answer: bytes | bytearray, *, control: bool) -> int | None:
    """Return how long the answer to `request` is that begins with `answer`; None while that cannot be told.

    A failure on the control channel has the length that it comes in: 4 bytes, or the whole layout in one piece.
    """
    if not control:
        return _data_answer_size(answer, prefixed=has_prefix(request))
    if len(answer) < _WORD:
        return None
    if not succeeded(answer):
        return len(answer)
    form = form_of(request)
    if form.answer_counted_at is None:
        return form.answer
    if len(answer) < form.answer:
        return None
    return form.answer + int(_U32.unpack_from(answer, form.answer_counted_at)[0])


def _data_answer_size(answer: bytes | bytearray, *, prefixed: bool) -> int | None:
    if prefixed:
        return None if len(answer) < _WORD else _WORD + int(_U32.unpack_from(answer)[0]) + _AFTER
    return None if len(answer) < HEADER_SIZE else int(_U32.unpack_from(answer, 2)[0])


def failure(request: bytes, *, control: bool) -> bytes:
    """Return what a client is told whose request was not executed, or nobody knows whether it was."""
    if control:
        form = form_of(request)
        return _U32.pack(_FAIL).ljust(form.answer if form.whole_failure else _WORD, b"\0")
    prefixed = has_prefix(request)
    command = request[PREFIX.size :] if prefixed else request
    tag = int.from_bytes(command[:2], "big")
    is_12 = Tag.TPM12_REQUEST <= tag <= Tag.TPM12_REQUEST_AUTH2
    family = TpmFamily.TPM_1_2 if is_12 else TpmFamily.TPM_2_0
    answer = error_response(family, ResponseCode.TPM12_FAIL if is_12 else ResponseCode.FAILURE)
    return _U32.pack(len(answer)) + answer + bytes(_AFTER) if prefixed else answer
