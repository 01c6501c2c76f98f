"""Key material as types: what holds a secret does not print, hash, copy or pickle itself.

Nothing in here encrypts. Anything that needs the bytes asks for `view`, uses it and lets it go.
"""

import hmac
import os
from typing import ClassVar, NoReturn, Self

from storage.errors import SecretWiped, WrongSecretSize


class Secret:
    """Fixed-size secret bytes in a buffer that can be overwritten.

    `size` is in bytes. Comparison takes the same time whatever differs; secrets of different types
    are never equal. Raises WrongSecretSize when made from another number of bytes.
    """

    size: ClassVar[int] = 32
    __slots__ = ("_content", "_wiped")

    def __init__(self, content: bytes | bytearray | memoryview) -> None:
        if len(content) != self.size:
            raise WrongSecretSize(type(self).__name__, self.size, len(content))
        self._content = bytearray(content)
        self._wiped = False

    @classmethod
    def new(cls) -> Self:
        """Make a fresh secret of `size` bytes from the kernel's random generator."""
        return cls(os.urandom(cls.size))

    @property
    def view(self) -> memoryview:
        """Read-only view of the bytes, without a copy. Raises SecretWiped after `wipe`."""
        if self._wiped:
            raise SecretWiped(type(self).__name__)
        return memoryview(self._content).toreadonly()

    def reveal(self) -> bytes:
        """Copy the bytes out, for messages that must carry them; the copy cannot be wiped.

        Raises SecretWiped after `wipe`.
        """
        if self._wiped:
            raise SecretWiped(type(self).__name__)
        return bytes(self._content)

    def wipe(self) -> None:
        """Overwrite the bytes with zeros; every later use raises SecretWiped. May be repeated."""
        self._content[:] = bytes(len(self._content))  # of the same length: in place
        self._wiped = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wipe()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return hmac.compare_digest(self.view, other.view)

    # A hash of a secret in a set or dict would be a place where it lives on.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'wiped' if self._wiped else f'{self.size} bytes'}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is not to be copied or pickled")


class StoreKey(Secret):
    """256-bit root key of a store image: root, maps, log envelope (design section 5)."""

    __slots__ = ()


class GroupKey(Secret):
    """256-bit master key of one group: that group's vTPM records (design section 5)."""

    __slots__ = ()


class ExportKey(Secret):
    """256-bit key of one export of one vTPM's state, for its parts (frontend_backend.state_blob)."""

    __slots__ = ()


class StateKey(Secret):
    """256-bit key of one save of one vTPM's state; used for exactly one encryption."""

    __slots__ = ()
