"""What a verb's declaration says. This module imports nothing heavy: the commands start with it."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

MAX_CONTENT: Final = 16 * 1024  # bytes of a file that is sent with a request: keys, approvals; a datagram has 128 KiB


LISTS: Final = ("list", "measurements")  # kinds whose value is any number of words


class Role(IntEnum):
    """What a caller may do; each role includes the ones below."""

    AUDITOR = 1  # look
    OPERATOR = 2  # run: attach, detach, reset a platform
    ADMINISTRATOR = 3  # make and unmake vTPMs


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a verb. `kind` "path" is opened by the client and travels as a descriptor.

    Of a "text" the client sends the file's content, of "bytes" the same in hexadecimal, MAX_CONTENT bytes at most.

    A "list" may be given several times, or, positional, several in a row; its default is none of them. So may
    "measurements", of which the client sends digests (manager.measure_option).
    """

    name: str
    help: str
    kind: str = "str"  # str | int | flag | path | text | bytes | list | measurements
    positional: bool = False
    required: bool = False
    default: str | int | bool | None = None
    choices: tuple[str, ...] = ()
    local: bool = False  # for the command itself, never sent to the manager

    @property
    def option(self) -> str:
        """The argument's name on the command line."""
        return self.name if self.positional else "--" + self.name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb: who may use it and what it takes. `many` verbs answer with an array in JSON."""

    name: str
    help: str
    role: Role
    arguments: tuple[Argument, ...] = ()
    many: bool = False
    prints: str = "uuid"  # field printed alone by --quiet, and by verbs with `terse`
    terse: bool = False
    saves: str = ""  # field that `--output FILE` writes to a new file instead of showing it
    saves_as: str = "text"  # or "bytes": the field has them in hexadecimal
    judges: bool = False  # each document has a `verdict` and the exit `code` it asks for
    columns: tuple[str, ...] = field(default=("uuid", "name", "group", "tpm", "state", "guest", "frontend"))
