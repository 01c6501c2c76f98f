"""Pages that somebody else writes to, or that a process stops writing to, at an exact moment."""

from collections.abc import Callable
from typing import cast

from frontend_backend.tpmif import PAGE_SIZE

Index = int | slice


class StoppedError(Exception):
    """Stands for a process killed between two stores."""


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

    def __getitem__(self, index: Index) -> int | bytes:
        self._before("read", index)
        part = self.memory[index]
        return part if isinstance(part, int) else bytes(part)

    def __setitem__(self, index: Index, value: int | bytes) -> None:
        self._before("write", index)
        memoryview(self.memory)[index] = value  # type: ignore[index, assignment]


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
