"""Thousands of instances' ends of rings, held by a few processes that save as quickly as they are answered.

What is at the other end is the product's: rings, messages, ring server, committer, store. Only the TPMs are missing.
"""

import hashlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from frontend_backend.bare_mapping import map_without_descriptor
from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import Commit, CommitReply, decode_reply, encode_request
from frontend_backend.ring import FrontRing

LEASE: Final = 1000
_AT_ONCE: Final = 3000  # rings one process holds: its ends and ours are open in this one while it is forked
_ORDER: Final = struct.Struct("<III")  # every how many-th ring is active; saves of each, or 0; milliseconds, or 0
_RESULT: Final = struct.Struct("<QdQ")  # saves, seconds, refusals


@dataclass(frozen=True, slots=True)
class Result:
    """What the crowd did: saves that were answered, how long it took, answers that were something else."""

    saves: int
    seconds: float
    refused: int


class _Saver:
    """One instance's end."""

    def __init__(self, ring: LocalRing) -> None:
        self.ring, self.front = ring, FrontRing(ring.page)
        self.generation = 0
        self.left = 0

    def save(self) -> None:
        self.left -= 1
        digest = hashlib.sha256(self.generation.to_bytes(8)).digest()
        self.front.submit(encode_request(Commit(self.generation + 1, digest, digest, LEASE)))
        self.ring.ring()

    def answered(self) -> bool | None:
        """Whether the save was taken, None while there is no answer."""
        self.ring.drain()
        packet = self.front.poll()
        if packet is None:
            return None
        self.generation += 1
        return decode_reply(packet)[0] == CommitReply(self.generation)


def _run(savers: Sequence[_Saver], each: int, seconds: float) -> Result:
    by_fileno = {saver.ring.fileno(): saver for saver in savers}
    poll = select.epoll()
    for descriptor, saver in by_fileno.items():
        saver.left = each or 1 << 62
        poll.register(descriptor, select.EPOLLIN)
        saver.save()
    done = refused = 0
    busy, started = len(savers), time.monotonic()
    limit = started + seconds if seconds else float("inf")
    while busy:
        for descriptor, _ in poll.poll():
            saver = by_fileno[descriptor]
            taken = saver.answered()
            if taken is None:
                continue
            done += 1
            refused += not taken
            if saver.left and time.monotonic() < limit:
                saver.save()
            else:
                busy -= 1
    poll.close()
    return Result(done, time.monotonic() - started, refused)


def _serve(orders: socket.socket, rings: list[LocalRing]) -> None:
    savers = [_Saver(ring) for ring in rings]
    while data := orders.recv(_ORDER.size):
        stride, each, milliseconds = _ORDER.unpack(data)
        result = _run(savers[::stride], each, milliseconds / 1000)
        orders.send(_RESULT.pack(result.saves, result.seconds, result.refused))


class Crowd:
    """The processes; `rings` are the ends of the one who serves, its number the one of its vTPM."""

    def __init__(self) -> None:
        self.rings: list[LocalRing] = []
        self._orders: list[socket.socket] = []
        self._pids: list[int] = []

    def grow(self, count: int) -> None:
        """Make `count` rings more, and a process that holds their other ends."""
        pairs = []
        for _ in range(count):
            front, back = LocalRing.pair(map_without_descriptor)
            front.forget_page_descriptor()
            back.forget_page_descriptor()
            pairs.append((front, back))
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            try:
                ours.close()
                for ring in (*self.rings, *(back for _, back in pairs)):
                    ring.close()
                _serve(theirs, [front for front, _ in pairs])
            finally:
                os._exit(0)
        theirs.close()
        for front, back in pairs:
            front.close()
            self.rings.append(back)
        self._orders.append(ours)
        self._pids.append(pid)

    def start(self, every: int = 1, saves: int = 0, seconds: float = 0.0) -> None:
        """Let every so-many-th instance save, one save after the other, so often or for so long."""
        for orders in self._orders:
            orders.send(_ORDER.pack(every, saves, int(seconds * 1000)))

    def results(self) -> Result:
        """Wait until all have done what they were told to; blocks."""
        results = [Result(*_RESULT.unpack(orders.recv(_RESULT.size))) for orders in self._orders]
        return Result(
            sum(result.saves for result in results),
            max(result.seconds for result in results),
            sum(result.refused for result in results),
        )

    def close(self) -> None:
        """End the processes and close our ends, those that nobody took over."""
        for orders in self._orders:
            orders.close()
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for ring in self.rings:
            ring.close()


@contextmanager
def crowd_of(count: int, processes: int = 1) -> Iterator[Crowd]:
    """Make `count` rings, whose other ends are in so many processes, or more where one cannot hold them."""
    crowd = Crowd()
    try:
        share = min(_AT_ONCE, -(-count // processes))
        while len(crowd.rings) < count:
            crowd.grow(min(share, count - len(crowd.rings)))
        yield crowd
    finally:
        crowd.close()
