"""Runs in a domain, for bench_xen.py: times one TPM command COUNT times, prints nanoseconds, a line each.

xen_probe.py COUNT HEX front             this domain's vTPM device, as its front end in user space
xen_probe.py COUNT HEX ring PATH         a local ring, from its listener
xen_probe.py COUNT HEX socket PATH       swtpm's data socket
"""

import socket
import sys
import time
from collections.abc import Awaitable, Callable

import trio

from frontend_backend.front import RingFrontEnd
from frontend_backend.xen_devices import DeviceEventChannels, DeviceGrantOffers
from frontend_backend.xen_front_trio import XenFront
from frontend_backend.xs_trio import open_xenstore

_WARM = 10  # commands before those that count
_SECONDS = 60


def _said(nanoseconds: int, answer: bytes) -> str:
    assert answer[6:10] == bytes(4), answer.hex()
    return str(nanoseconds)


def _timed(count: int, call: Callable[[], bytes]) -> list[str]:
    lines = []
    for _ in range(count + _WARM):
        began = time.perf_counter_ns()
        answer = call()
        lines.append(_said(time.perf_counter_ns() - began, answer))
    return lines[_WARM:]


async def _timed_async(count: int, call: Callable[[], Awaitable[bytes]]) -> list[str]:
    lines = []
    for _ in range(count + _WARM):
        began = time.perf_counter_ns()
        answer = await call()
        lines.append(_said(time.perf_counter_ns() - began, answer))
    return lines[_WARM:]


async def _front(count: int, command: bytes) -> list[str]:
    channels, offers = DeviceEventChannels.open(), DeviceGrantOffers.open()
    async with open_xenstore() as xs, trio.open_nursery() as nursery:
        front = XenFront(xs, channels, offers, f"/local/domain/{await xs.own_domain()}/device/vtpm/0")
        await nursery.start(front.run)
        with trio.fail_after(_SECONDS):
            lines = await _timed_async(count, lambda: front.transact(command))
        nursery.cancel_scope.cancel()
    return lines


def _ring(count: int, command: bytes, path: str) -> list[str]:
    end = RingFrontEnd.connect(path)

    def call() -> bytes:
        end.begin(command)
        return end.wait(_SECONDS)

    return _timed(count, call)


def _socket(count: int, command: bytes, path: str) -> list[str]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)

        def call() -> bytes:
            sock.sendall(command)
            return sock.recv(4096)

        return _timed(count, call)


def main() -> int:
    """Run what the command line says."""
    count, command, way, *rest = int(sys.argv[1]), bytes.fromhex(sys.argv[2]), *sys.argv[3:]
    if way == "front":
        lines = trio.run(_front, count, command)
    else:
        lines = {"ring": _ring, "socket": _socket}[way](count, command, rest[0])
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
