"""Fuzz every parser of frontend_backend: mutated messages, mutated pages, and peers that write to the page as we read.

    python tests/fuzz/fuzz_frontend_backend.py --seconds 60 [--seed N]

Ends with one line. When anything but the documented errors comes out: which step, with which seed, and the traceback.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hostile_page import scribbled

from frontend_backend import messages_admin as admin
from frontend_backend import messages_instance as instance
from frontend_backend import messages_keeper as keeper
from frontend_backend.errors import (
    HeaderError,
    IllegalTransitionError,
    MessageError,
    PageError,
    RingCancelledError,
)
from frontend_backend.ring import BackRing, FrontRing, Request
from frontend_backend.tpmhdr import CommandHeader, command
from frontend_backend.tpmif import MAX_PACKET, PAGE_SIZE, RingState, SharedPage

INTERESTING: Final = (
    b"\0", b"\xff", b"\x7f", b"\x80", b"\xc0", b"\xc1", b"\xc2", b"\xc3", b"\x91", b"\x81", b"\xcb\x7f\xf8" + bytes(6),
    b"\xff" * 4, b"\xff" * 8, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff", b"\xc9\0\0\0\x01\xff\0", b"\xd6\xff\0\0\0\0", b"\xcf" + b"\xff" * 8, b"\x91" * 2000,
)  # fmt: skip
KEPT: Final = keeper.Kept(bytes(16), 1, 100, "socket", ("data", "control"), alive=False, status=-9)
REQUESTS: Final[tuple[instance.Request, ...]] = (
    instance.Load(),
    instance.Commit(7, bytes(32), bytes(range(32)), 3, final=True),
    instance.Random(64),
    instance.PcrRead("sha256", (0, 2, 7)),
    instance.Measurements(),
    instance.Quote(bytes(64), bytes(100)),
    instance.QuoteTask(),
    instance.QuoteMade(1 << 40, bytes(100), "text"),
    instance.Report(instance.InstanceState.READY, "reason", "text"),
)
REPLIES: Final[tuple[instance.Reply, ...]] = (
    instance.LoadReply(bytes(16), "2.0", 1, False, bytes(32), bytes(32), 9, "clear", 5.0),
    instance.CommitReply(7),
    instance.RandomReply(bytes(64)),
    instance.PcrReadReply((bytes(32), bytes(32))),
    instance.MeasurementsReply((bytes(181), bytes(181))),
    instance.QuoteReply(bytes(145)),
    instance.QuoteTaskReply(1 << 40, bytes(64), 0xFFFFFF),
    instance.ReportReply(),
    instance.Refusal(instance.RefusalCode.MALFORMED, "text"),
)
KEEPER: Final[tuple[keeper.KeeperRequest | keeper.KeeperReply, ...]] = (
    keeper.Spawn(bytes(16), 1, "2.0", 0, 0, "socket", 0, 0, ("data", "control")),
    keeper.ListReply((KEPT, KEPT), 2),
    keeper.Fetched(KEPT),
    keeper.Forgotten(None),
    keeper.KeeperRefusal("text"),
)
ADMIN: Final[tuple[admin.AdminRequest | admin.AdminReply, ...]] = (
    admin.AdminRequest("add", {"name": "x", "count": 1, "yes": True, "group": None}),
    admin.Row({"uuid": "x", "list": [1, {"deep": [None]}], "ratio": 0.5}),
    admin.Note("text"),
    admin.Done(),
    admin.Failure(admin.ExitCode.BUSY, "text"),
)

Decode = Callable[[bytes], Any]
Encode = Callable[[Any], bytes]


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Return `data` with one to eight changes."""
    buffer = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(buffer) + 1)
        end = min(len(buffer), at + chance.choice((1, 1, 2, 4, 16)))
        match chance.randrange(6):
            case 0 if end > at:
                buffer[at] ^= 1 << chance.randrange(8)
            case 1:
                buffer[at:end] = chance.choice(INTERESTING)
            case 2:
                buffer[at:at] = chance.choice(INTERESTING)
            case 3:
                del buffer[at:end]
            case 4:
                buffer[at:at] = buffer[at:end] * chance.choice((1, 2, 50))
            case _:
                buffer[at:] = other[chance.randrange(len(other)) :]
    return bytes(buffer)


def message_target(
    decode: Decode, encode: Encode, samples: tuple[Any, ...], *, framed: bool
) -> Callable[[random.Random], None]:
    """Return a step that decodes one mutated message: out comes MessageError, or a message that survives encoding."""
    corpus = [encode(sample) for sample in samples]

    def step(chance: random.Random) -> None:
        data = mutated(chance.choice(corpus), chance.choice(corpus), chance)
        if framed and chance.random() < 0.8:
            data = data[:2] + len(data).to_bytes(4, "big") + data[6:]  # so that most get past the size check
        try:
            message = decode(data)
        except MessageError:
            return
        if len(data) < MAX_PACKET // 2:  # encoded again a message may be longer, and no longer fit a page
            assert decode(encode(message)) == message

    return step


def header_step(chance: random.Random) -> None:
    """Parse one mutated TPM header."""
    data = mutated(command(0x144, b"\0\0"), bytes(12), chance)
    try:
        header = CommandHeader.unpack(data)
    except HeaderError:
        return
    assert header.pack() == data[:10]


SECRET: Final = b"an answer of before"


def random_head(chance: random.Random) -> bytes:
    """Return 8 bytes that are often nearly right."""
    if chance.random() < 0.3:
        return chance.randbytes(8)
    length = chance.choice((0, 1, 10, MAX_PACKET, MAX_PACKET + 1, 2**31, 2**32 - 1, chance.randrange(PAGE_SIZE)))
    return SharedPage(
        length, chance.choice(tuple(RingState)), chance.randrange(256), chance.choice((0, 0, 1, 255))
    ).pack()


def random_script(chance: random.Random) -> dict[int, tuple[int, bytes]]:
    """Return what a hostile peer writes before which access."""
    script = {}
    for _ in range(chance.randrange(6)):
        where = chance.choice((0, 0, 4, 8, chance.randrange(PAGE_SIZE)))
        script[chance.randrange(16)] = (where, random_head(chance) if where != 4 else chance.randbytes(1))
    return script


def random_page(chance: random.Random) -> bytearray:
    """Return a page with a head, some bytes behind it, and one byte everywhere else."""
    return bytearray((random_head(chance) + chance.randbytes(64)).ljust(PAGE_SIZE, chance.randbytes(1)))


def back_step(chance: random.Random) -> None:
    """Run a back end against a front end that writes at any moment; then the page must serve an honest command."""
    memory = random_page(chance)
    back = BackRing(scribbled(memory, random_script(chance)), instance.refusal_for_malformed)
    for _ in range(20):
        taken = back.take()
        if isinstance(taken, Request):
            assert 0 < len(taken.packet) <= MAX_PACKET
            back.finish(SECRET * chance.randrange(200))
    memory[:14] = SharedPage(6, RingState.SUBMIT, 0, 0).pack() + b"\xee" * 6
    assert back.take() == Request(b"\xee" * 6, 0)
    assert back.finish(b"ok")
    assert memory[8:14] == b"ok".ljust(6, b"\0"), "nothing of the request may stay"
    assert SECRET not in memory, "nothing of an earlier answer may stay"


def front_step(chance: random.Random) -> None:
    """Run a front end against a back end that writes at any moment."""
    memory = random_page(chance)
    front = FrontRing(scribbled(memory, random_script(chance)))
    steps = (lambda: front.submit(b"packet"), front.poll, front.cancel, front.discard, lambda: front.in_flight)
    for _ in range(6):
        try:
            answer = chance.choice(steps)()
        except (PageError, IllegalTransitionError, RingCancelledError):
            continue
        assert not isinstance(answer, bytes) or len(answer) <= MAX_PACKET


STEPS: Final = (
    message_target(instance.decode_request, instance.encode_request, REQUESTS, framed=True),
    message_target(lambda data: instance.decode_reply(data)[0], instance.encode_reply, REPLIES, framed=True),
    message_target(keeper.decode_keeper, keeper.encode_keeper, KEEPER, framed=False),
    message_target(admin.decode_admin, admin.encode_admin, ADMIN, framed=False),
    header_step,
    back_step,
    front_step,
)


def main() -> int:
    """Run the steps in turn until the time is up."""
    parser = argparse.ArgumentParser(description="Fuzz the parsers of frontend_backend.")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    started, count = time.monotonic(), 0
    while time.monotonic() - started < options.seconds:
        seed = options.seed + count
        try:
            STEPS[count % len(STEPS)](random.Random(seed))
        except BaseException:
            sys.stdout.write(f"fuzz frontend_backend: step {count % len(STEPS)} failed with random.Random({seed})\n")
            raise
        count += 1
    seconds = time.monotonic() - started
    sys.stdout.write(
        f"fuzz frontend_backend: {count} inputs in {seconds:.1f} s from seed {options.seed}: documented errors only\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
