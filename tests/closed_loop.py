"""One process of clients: each of its vTPMs has one durable NV_Write in flight, always.

Run by `load_clients.load`. On standard input a line of JSON says whom to serve and for how long; a second line starts
the clock, so that several such processes begin together. On standard output one line of JSON: counts and latencies.
"""

import json
import select
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import vtpm_instance_commands as tpm

INDEX, CONTENT = 0x1500016, 64
_RC_RETRY = 0x922
_ANSWER_SECONDS = 120.0


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(_ANSWER_SECONDS)
    sock.connect(path)
    return sock


def run(sock: socket.socket, packet: bytes) -> None:
    """One command that must succeed."""
    code = _RC_RETRY
    while code == _RC_RETRY:
        sock.sendall(packet)
        code = answer_code(sock.recv(4096))
    if code:
        raise SystemExit(f"a vTPM answered {code:#x}")


def answer_code(answer: bytes) -> int:
    if len(answer) < 10:
        raise SystemExit(f"a vTPM went away ({len(answer)} bytes of an answer)")
    return int.from_bytes(answer[6:10])


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    order = json.loads(sys.stdin.readline())
    socks = [connect(path) for path in order["endpoints"]]
    if order["define"]:
        for sock in socks:
            run(sock, tpm.nv_define(INDEX, CONTENT))
            run(sock, tpm.nv_write(INDEX, bytes(CONTENT)))
    say("ready")
    sys.stdin.readline()
    counts, latencies = closed_loop(socks, order["warm_up"], order["seconds"])
    say(json.dumps({"counts": counts, "latencies": latencies}))
    return 0


def closed_loop(socks: list[socket.socket], warm_up: float, seconds: float) -> tuple[list[int], list[int]]:
    """Return how many answers each had within the time, and all latencies in microseconds."""
    clock = time.perf_counter
    packets = [tpm.nv_write(INDEX, number.to_bytes(8) * (CONTENT // 8)) for number in range(256)]
    epoll = select.epoll()
    which = {}
    for number, sock in enumerate(socks):
        which[sock.fileno()] = number
        epoll.register(sock.fileno(), select.EPOLLIN)
    counts, latencies = [0] * len(socks), []
    sent = [0.0] * len(socks)
    begin = clock() + warm_up
    end, flying, total = begin + seconds, len(socks), 0
    for number, sock in enumerate(socks):
        sent[number] = clock()
        sock.sendall(packets[0])
    while flying:
        for descriptor, _ in epoll.poll(_ANSWER_SECONDS):
            number = which[descriptor]
            sock = socks[number]
            if code := answer_code(sock.recv(4096)):
                raise SystemExit(f"a vTPM answered {code:#x}")
            now = clock()
            if begin <= now < end:
                counts[number] += 1
                latencies.append(int((now - sent[number]) * 1e6))
            if now >= end:
                flying -= 1
                continue
            total += 1
            sent[number] = now
            sock.sendall(packets[total % 256])
    return counts, latencies


if __name__ == "__main__":
    sys.exit(main())
