"""What administrators' commands and the manager say: SEQPACKET datagrams on the admin socket.

One request a connection; answers are any number of notes and rows, then one Done or Failure. Files that a verb names
are opened by the client and travel as descriptors with the request.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from frontend_backend.messages import Protocol

VERSION: Final = 1
ROWS_AT_ONCE: Final = 16  # a document has a path of 4 KiB at most, a datagram 128 KiB


class ExitCode(IntEnum):
    """Exit codes of every command, and `code` in a failure's JSON."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    DENIED = 5
    INTEGRITY = 6
    TPM_UNAVAILABLE = 7
    BUSY = 8


@dataclass(frozen=True, slots=True)
class AdminRequest:
    """One verb with its arguments by name; every argument is a string, a number, a truth value, strings, or absent."""

    verb: str
    arguments: dict[str, str | int | bool | tuple[str, ...] | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One document of the answer."""

    document: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rows:
    """Several documents of a long answer, in order; at most ROWS_AT_ONCE."""

    documents: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence for the person at the terminal; not part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The verb is done."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The verb was not done; `text` says what happened, what was kept and what to do."""

    code: ExitCode
    text: str


AdminReply = Row | Rows | Note | Done | Failure

_PROTOCOL = Protocol(VERSION, (AdminRequest, Row, Rows, Note, Done, Failure))


def encode_admin(message: AdminRequest | AdminReply) -> bytes:
    """Return the datagram of a message."""
    return _PROTOCOL.encode(message)


def decode_admin(untrusted: bytes) -> AdminRequest | AdminReply:
    """Return the message in a datagram.

    Raises:
        MessageError: it is none.

    """
    message: AdminRequest | AdminReply = _PROTOCOL.decode(untrusted)
    return message
