"""What an instance or the keeper tells the operator: one line each on standard error. Never a secret.

Not the logging package: an instance writes a handful of lines in its life, and what is imported costs memory.
"""

import sys
from typing import Final

_subject: Final = ["vtpm-keeper"]


def speak_as(subject: str) -> None:
    """Begin every further line of this process with `subject`."""
    _subject[0] = subject


def note(text: str) -> None:
    """Write one line; line breaks in `text` become blanks."""
    sys.stderr.write(f"{_subject[0]}: {' '.join(text.splitlines())}\n")
    sys.stderr.flush()
