"""What an instance or the keeper tells the operator: one line each on standard error. Never a secret.

Not the logging package: an instance writes a handful of lines in its life, and what is imported costs memory.
"""

import os
from contextlib import suppress
from typing import Final

_STANDARD_ERROR: Final = 2
_beginning: Final = ["vtpm-keeper: "]


def speak_as(subject: str) -> None:
    """Begin every further line of this process with `subject`."""
    begin_with(f"{subject}: ")


def begin_with(beginning: str) -> None:
    """Begin every further line of this process with `beginning`, as it is."""
    _beginning[0] = beginning


def note(text: str) -> None:
    """Write one line; line breaks in `text` become blanks. Never raises."""
    line = f"{_beginning[0]}{' '.join(text.splitlines())}\n"
    # A log that takes nothing (a full disk, a reader that is gone) must not end a vTPM: its PCRs would be lost.
    with suppress(OSError):
        os.write(_STANDARD_ERROR, line.encode("utf-8", "backslashreplace"))
