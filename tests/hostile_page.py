"""Pages that somebody else writes to, or that a process stops writing to, at an exact moment."""

from collections.abc import Callable
from typing import Final, cast

from frontend_backend.tpmif import PAGE_SIZE

Index = int | slice
HEAD: Final = slice(None, 8)


class StoppedError(Exception):
    """Stands for a process killed between two stores."""


class Slice(bytes):
    """Bytes that were read, with the one method of a memoryview that the rings use."""

    __slots__ = ()

    def tobytes(self) -> bytes:
        """Return what was read."""
        return bytes(self)


class WatchedPage:
    """Memory that calls `before(kind, index)` ahead of each access; `kind` is "read" or "write".

    It answers the operations that the rings use of a memoryview, so that a test can interleave another party's
    stores between any two of ours, without threads.
    """

    readonly = False

    def __init__(self, memory: bytearray, before: Callable[[str, Index], None]) -> None:
        assert len(memory) == PAGE_SIZE
        self.memory = memory
        self._before = before

    def __len__(self) -> int:
        return len(self.memory)

    def __getitem__(self, index: Index) -> "int | Slice":
        self._before("read", index)
        part = self.memory[index]
        return part if isinstance(part, int) else Slice(part)

    def __setitem__(self, index: Index, value: int | bytes) -> None:
        self._before("write", index)
        memoryview(self.memory)[index] = value  # type: ignore[index, assignment]

    def cast(self, form: str) -> "WatchedWords":
        """Return the page as words; the rings use the first, which is the head."""
        assert form == "Q"
        return WatchedWords(self)


class WatchedWords:
    """The head of a watched page, read and written in one access."""

    def __init__(self, page: WatchedPage) -> None:
        self._page = page

    def __getitem__(self, index: int) -> int:
        assert index == 0
        return int.from_bytes(cast("bytes", self._page[HEAD]), "little")

    def __setitem__(self, index: int, word: int) -> None:
        assert index == 0
        self._page[HEAD] = word.to_bytes(8, "little")


def watched(memory: bytearray, before: Callable[[str, Index], None]) -> memoryview:
    """Return a WatchedPage where the rings' signatures want a memoryview."""
    return cast("memoryview", WatchedPage(memory, before))


def recorded(memory: bytearray) -> tuple[memoryview, list[tuple[str, Index]]]:
    """Return a page over `memory` and the list that grows with every access to it."""
    accesses: list[tuple[str, Index]] = []
    return watched(memory, lambda kind, index: accesses.append((kind, index))), accesses


def stopping(memory: bytearray, stores: int) -> memoryview:
    """Return a page on which `stores` writes happen and the next one raises StoppedError instead."""
    left = stores

    def before(kind: str, index: Index) -> None:
        nonlocal left
        if kind == "write":
            if not left:
                raise StoppedError
            left -= 1

    return watched(memory, before)


def scribbled(memory: bytearray, script: dict[int, tuple[int, bytes]]) -> memoryview:
    """Return a page that a peer overwrites: before the nth access, `script[n]` = (offset, bytes) is stored."""
    count = 0

    def before(kind: str, index: Index) -> None:
        nonlocal count
        offset, data = script.get(count, (0, b""))
        data = data[: PAGE_SIZE - offset]
        memory[offset : offset + len(data)] = data
        count += 1

    return watched(memory, before)
