"""What `--measure` says: files and texts hashed by whoever gives the command, with his rights.

The manager opens no file of a guest's for it and is sent digests alone. So a file that is changed afterwards is
measured as it was; `vtpm-measure` gives new digests for the next boot.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from typing import IO, Final

from frontend_backend.errors import MessageError
from frontend_backend.measurements import PCR_OF, Measurement, all_to_text
from manager.errors import NotFoundError, UsageError

TOOLSTACK: Final = "toolstack"
"""In place of digests: those of the files that Xen's toolstack names, at each boot of the guest."""
_FILES: Final = ("kernel", "initrd")
_PIECE: Final = 1024 * 1024  # bytes read at a time
_MAX_CMDLINE: Final = 64 * 1024  # bytes; Linux takes 2,048 on x86, and 4,096 elsewhere
_HOW: Final = "write kernel=PATH, initrd=PATH, cmdline=TEXT, cmdline=@FILE, or digests as docs/measurements.md has them"


def from_option(word: str) -> str:
    """Return what `--measure WORD` is sent as to the manager: digests, computed here from a file or a text.

    `kernel=PATH`, `initrd=PATH`, `cmdline=TEXT`, `cmdline=@FILE` (one line end at the file's end is not part of it),
    `WHAT:sha1=HEX,sha256=HEX,sha384=HEX,sha512=HEX`, or `toolstack`. One thing a word: commas are a text's own.

    Raises:
        UsageError: it is none of these. NotFoundError: a file cannot be read.

    """
    if word == TOOLSTACK:
        return word
    what, equals, value = word.partition("=")
    if what not in PCR_OF or not equals:
        return parse((word,))  # digests, or nothing at all
    if what in _FILES:
        return measure_file(what, value).to_text()
    return Measurement.of(what, [_cmdline(value)]).to_text()


def _cmdline(value: str) -> bytes:
    """Return a command line given as it is, or as the name of a file that holds it."""
    if not value.startswith("@"):
        return os.fsencode(value)
    try:
        with open(value[1:], "rb") as file:
            content = file.read(_MAX_CMDLINE + 1)
    except OSError as error:
        raise _unreadable("cmdline", value[1:], error) from error
    if len(content) > _MAX_CMDLINE:
        raise UsageError(f"{value[1:]} is longer than {_MAX_CMDLINE} bytes: it is no command line. Nothing was done")
    return content.removesuffix(b"\n")


def measure_file(what: str, path: str) -> Measurement:
    """Measure a file's content. Raises NotFoundError: it cannot be read. UsageError: it is no file."""
    try:
        # a FIFO would be waited for, a device has no end
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{path} is no regular file, so it cannot be measured as {what}. Nothing was done")
            return Measurement.of(what, _pieces(file))
    except OSError as error:
        raise _unreadable(what, path, error) from error


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


def _unreadable(what: str, path: str, error: OSError) -> NotFoundError:
    return NotFoundError(f"{what} {path} cannot be read: {error.strerror or error}. Nothing was done")


def parse(words: Sequence[str]) -> str:
    """Return several measurements, as `from_option` returns them, as one text for an attachment's row; "" for none.

    Raises:
        UsageError: they are none, one is there twice, or there is one beside `toolstack`.

    """
    if TOOLSTACK in words:
        if len(words) > 1:
            raise UsageError(f"--measure {TOOLSTACK} stands alone: each boot is measured then. Nothing was done")
        return TOOLSTACK
    try:
        return all_to_text(map(Measurement.from_text, words))
    except MessageError as error:
        raise UsageError(f"{error}; {_HOW}. Nothing was done") from error


def of_toolstack(kernel: str, cmdline: str, initrd: str) -> str:
    """Measure what Xen's toolstack starts a guest with; an empty word is a thing that the guest does not have.

    Reads files, so it is for a thread. libxl names them for PV guests alone (libxl_create.c, libxl__domain_build): of
    others there is nothing to measure. What pygrub took out of a guest's disk is gone by now, and refused.

    Raises:
        ManagerError: a file cannot be read.

    """
    measured = [measure_file("kernel", kernel)] if kernel else []
    measured += [Measurement.of("cmdline", [os.fsencode(cmdline)])] if cmdline else []
    measured += [measure_file("initrd", initrd)] if initrd else []
    return all_to_text(measured)
