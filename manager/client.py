"""The administrators' side of the admin socket: one request, its rows, or an error with an exit code."""

import os
import socket
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Final

from frontend_backend.descriptors import receive_message, send_message
from frontend_backend.errors import ChannelClosedError, MessageError
from frontend_backend.messages_admin import (
    AdminRequest,
    Done,
    ExitCode,
    Failure,
    Note,
    Row,
    Rows,
    decode_admin,
    encode_admin,
)
from manager.errors import BusyError, DeniedError, ManagerError, NotFoundError, UsageError
from manager.named_path import open_named
from manager.verb_form import MAX_CONTENT

SOCKET_VARIABLE: Final = "VTPM_MANAGER_SOCKET"
DEFAULT_SOCKET: Final = "/run/vtpm-manager/admin.sock"
ANSWER_SECONDS: Final = 180.0  # above the manager's own longest deadline (a clean stop of many instances)


class RemoteError(ManagerError):
    """The manager's own words about what it did not do; `exit_code` is its code."""

    def __init__(self, exit_code: ExitCode, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def request(
    path: str,
    verb: str,
    arguments: dict[str, str | int | bool | tuple[str, ...] | None],
    descriptors: tuple[int, ...] = (),
    on_note: Callable[[str], None] = lambda _text: None,
) -> list[dict[str, Any]]:
    """Ask the manager at `path` for one verb and return its documents; raises as `stream` does."""
    return list(stream(path, verb, arguments, descriptors, on_note))


def stream(
    path: str,
    verb: str,
    arguments: dict[str, str | int | bool | tuple[str, ...] | None],
    descriptors: tuple[int, ...] = (),
    on_note: Callable[[str], None] = lambda _text: None,
) -> Generator[dict[str, Any]]:
    """Ask the manager at `path` for one verb and yield its documents as they come. Close it if not read to the end.

    The manager waits 30 s for a reader, no longer.

    Raises:
        NotFoundError: no manager listens there. DeniedError: the socket may not be used. BusyError: no answer.
        RemoteError: the manager refused, or failed on the way: what was yielded then is not all.

    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(ANSWER_SECONDS)
        _connect(sock, path)
        try:
            message = encode_admin(AdminRequest(verb, arguments))
        except MessageError as error:
            raise UsageError(
                "an argument cannot be sent: text is UTF-8 and numbers have 64 bits. Nothing was asked for"
            ) from error
        try:
            send_message(sock, message, descriptors)
        except OSError as error:
            raise _went_away(error) from error
        while (documents := _next(sock, on_note)) is not None:
            yield from documents


def answers(path: str) -> bool:
    """Tell whether a manager listens at `path`: one that was killed leaves its socket there. Raises DeniedError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(ANSWER_SECONDS)
        try:
            _connect(sock, path)
        except NotFoundError:
            return False
    return True


def _went_away(error: Exception) -> BusyError:
    return BusyError(f"the manager went away before it answered ({error}); look with 'vtpm list'")


def _connect(sock: socket.socket, path: str) -> None:
    try:
        sock.connect(path)
    except PermissionError as error:
        raise DeniedError(f"not allowed to use {path}: ask an administrator for a role") from error
    except OSError as error:
        raise NotFoundError(
            f"no manager answers at {path} ({error.strerror or error}): start 'vtpm-manager run', or name its socket "
            f"with --socket or {SOCKET_VARIABLE}"
        ) from error


def _next(sock: socket.socket, on_note: Callable[[str], None]) -> Sequence[dict[str, Any]] | None:
    """Return the next documents, None when the answer is complete."""
    try:
        while True:
            match decode_admin(receive_message(sock)[0]):
                case Row(document):
                    return [document]
                case Rows(documents):
                    return documents
                case Note(text):
                    on_note(text)
                case Done():
                    return None
                case Failure(code, text):
                    raise RemoteError(code, text)
                case AdminRequest():
                    raise MessageError("a request where an answer is due")
    except TimeoutError:
        raise BusyError(f"the manager gave no answer within {ANSWER_SECONDS:g} s; it may still do it") from None
    except (ChannelClosedError, OSError) as error:
        raise _went_away(error) from error
    except MessageError as error:
        raise ManagerError(f"cannot understand the manager: {error}") from error


def socket_path(option: str | None) -> str:
    """Return the admin socket to use: the option, the environment, or the system's."""
    return option or os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET


def open_for_verb(path: str) -> int:
    """Open a file or block device named on the command line, for the manager to use.

    A missing file is made, with no permission for others.

    Raises:
        OSError: it cannot be opened.

    """
    return open_named(Path(path), os.O_RDWR | os.O_CREAT)


def content_for_verb(path: str, kind: str) -> str:
    """Read a file named on the command line: its text, or for `kind` "bytes" its content in hexadecimal.

    Raises:
        OSError: it cannot be read. UsageError: it is longer than anything that is sent so, or no text.

    """
    with open(path, "rb") as file:
        content = file.read(MAX_CONTENT + 1)
    if len(content) > MAX_CONTENT:
        raise UsageError(f"{path} is longer than {MAX_CONTENT} bytes: it is not what it should be. Nothing was sent")
    if kind == "bytes":
        return content.hex()
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text: it is not what it should be. Nothing was sent") from None
