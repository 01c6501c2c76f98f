"""What every command does at its edges: closed standard descriptors, an output that takes no more, Ctrl-C."""

import argparse
import functools
import io
import os
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TextIO, cast

from frontend_backend.messages_admin import ExitCode

_STANDARD_OUTPUT: Final = 1
_STANDARD: Final = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
_STANDARD_ERROR: Final = 2
_INTERRUPTED: Final = 128 + signal.SIGINT  # as shells count it


class Main(Protocol):
    """A command's entry point: takes its words (default: the process's), returns its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run the command."""


def parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, may_be_empty: Collection[str] = ()
) -> argparse.Namespace:
    """Parse a command's words. One that is empty is a usage error, as what a variable that is not set leaves.

    It would be taken for an option that was not given: no approver, no authority, the working directory.
    """
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        if name not in may_be_empty and "" in (value if isinstance(value, list) else [value]):
            parser.error(f"{name.replace('_', '-')} is given, but empty. Nothing was done")
    return options


def place(text: str) -> Path:
    """Return the path of a word, for argparse; `Path("")` would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("the path is given, but empty. Nothing was done")
    return Path(text)


class OutputError(Exception):
    """Standard output took no more, and somebody waits for it: as on a full disk. The message says why."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))


class ReaderGoneError(Exception):
    """Who reads standard output has seen enough: what makes one line after the other can stop."""


class _Output:
    """Standard output, whose refusals are told from those of every other file: they are OutputErrors.

    Once its reader has gone it leads nowhere: whoever prints goes on, and ends with the exit code of what was done.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.reader_gone = False

    def write(self, text: str) -> int:
        with self._told():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self.reader_gone = True
            _lead_nowhere(self._stream)
        except OSError as error:
            raise OutputError(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def stop_if_enough() -> None:
    """Raise ReaderGoneError where nobody reads standard output any more."""
    if isinstance(sys.stdout, _Output) and sys.stdout.reader_gone:
        raise ReaderGoneError


def occupy_standard_descriptors() -> None:
    """Have no socket or store in the place of a standard descriptor that is closed: messages would go into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= _STANDARD_ERROR:
        os.set_inheritable(descriptor, True)
        name, mode = _STANDARD[descriptor]
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - while we live
    os.close(descriptor)


def whole(main: Main) -> Main:
    """Wrap a command's entry point, so that none of these ends it with a traceback.

    A closed standard descriptor leads nowhere. A reader of its output that has seen enough (`| head`) changes nothing
    about what it returns. An output that cannot be written (a full disk) is exit code 1, and Ctrl-C the death by SIGINT
    that shells expect, each with a sentence on standard error. Both are UTF-8, what is no text shown in hexadecimal.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        occupy_standard_descriptors()
        real = sys.stdout
        for stream in (real, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        sys.stdout = cast(TextIO, _Output(real))
        program = os.path.basename(sys.argv[0])
        code = None
        try:
            code = _flushed(main, argv)
        except OutputError as error:
            code = _cut_short(program, error, real)
        except (KeyboardInterrupt, BaseExceptionGroup) as error:  # a group: from tasks
            if isinstance(error, BaseExceptionGroup) and error.subgroup(KeyboardInterrupt) is None:
                raise
            _die_interrupted(program)
            code = _INTERRUPTED
        finally:
            sys.stdout = real
        return code

    return wrapped


def _flushed(main: Main, argv: Sequence[str] | None) -> int:
    """Run the command and see that its output has gone out."""
    try:
        code = main(argv)
    except SystemExit:  # argparse's, after --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def printable(text: str) -> str:
    """Return `text` with what would steer a terminal, or not show, written as Python writes it; line ends stay."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def _cut_short(program: str, error: OutputError, output: TextIO) -> int:
    _lead_nowhere(output)
    sys.stderr.write(
        f"{program}: the output could not be written: {error}. What was asked for may have been done all the same: "
        "look before you repeat it\n"
    )
    return int(ExitCode.FAILURE)


def _lead_nowhere(output: TextIO | None) -> None:
    """Let the interpreter's last flush go nowhere."""
    if output is not None and output is sys.__stdout__:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, _STANDARD_OUTPUT)
        os.close(nowhere)


def _die_interrupted(program: str) -> None:
    sys.stderr.write(f"{program}: interrupted. Whether it was done is not known: look before you repeat it\n")
    sys.stderr.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
