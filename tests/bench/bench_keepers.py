"""Listening ends of 20,000 attached, hibernated vTPMs over as many keepers as the limit of descriptors asks for."""

import os
import random
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import trio
from document import Section, Table, Target
from options import Options, progress

from frontend_backend import messages_keeper as k
from frontend_backend.channel_trio import receive_message_trio
from manager.capacity import raise_descriptor_limit
from manager.config import InstanceConfig, Layout
from manager.keepers import Keepers

ATTACHED: Final = 20_000
_SAMPLE: Final = 200  # of those whose sockets are tried, by a client that connects
_LEASE: Final = 1
_NAMES: Final = ("data", "control")
_SWTPM_PRIVATE: Final = 1.17 * 1024 * 1024  # bytes of one idle swtpm (reference/performance.md 2)


def run(options: Options) -> Section:
    """Measure and return the section."""
    attached = ATTACHED // 20 if options.quick else ATTACHED
    with tempfile.TemporaryDirectory(prefix="vb") as base:
        return trio.run(_measure, Path(base), attached, raise_descriptor_limit())


async def _measure(base: Path, attached: int, limit: int) -> Section:
    layout = Layout(base / "state", base / "run")
    (base / "run").mkdir()
    # a small run is to need several keepers, too
    config = InstanceConfig(per_keeper=0 if attached == ATTACHED else attached // 4)
    progress(f"keepers: {attached:,} vTPMs")
    keepers = await Keepers.connect(layout, config)
    started = time.perf_counter()
    for number in range(attached):
        await _arm(keepers, base, number)
    armed = time.perf_counter() - started
    keepers.close()
    started = time.perf_counter()
    keepers = await Keepers.connect(layout, config)
    found = len(await keepers.list())
    again = time.perf_counter() - started
    assert found == attached, f"{found} of {attached} were found by the next manager"
    waits = await _wake_some(keepers, base, attached)
    table = Table(("keeper", "vTPMs", "descriptors", "memory, MiB (PSS, its spawner's included)"))
    memory = 0
    for keeper in keepers.all:
        its = _pss(keeper.pid) + sum(map(_pss, _children(keeper.pid)))
        memory += its
        held = len(os.listdir(f"/proc/{keeper.pid}/fd"))
        table.add(keeper.path.name, f"{keepers.load_of(keeper):,}", f"{held:,}", f"{its / 1024**2:.1f}")
        assert held < limit, "a keeper is at its limit"
    await keepers.ask(k.Stop())
    keepers.close()
    section = Section(
        f"Keepers of {attached:,} vTPMs",
        f"{attached:,} hibernated vTPMs, two listening sockets each, in real keepers, a process may have {limit:,} "
        f"descriptors. {_SAMPLE} of them are then wanted by a client that connects.",
    )
    section.tables.append(table)
    section.meaning.append(
        f"Arming took {1e6 * armed / attached:.0f} us each, one after the other; the next manager found all in "
        f"{again:.2f} s. From a client's connect to the manager's word that it is wanted: median "
        f"{1000 * waits[len(waits) // 2]:.2f} ms, slowest of {_SAMPLE} {1000 * waits[-1]:.2f} ms."
    )
    section.targets.append(
        Target(
            "memory of all keepers, to that of so many idle swtpm", memory / (_SWTPM_PRIVATE * attached), 0.05, "ratio"
        )
    )
    return section


async def _arm(keepers: Keepers, base: Path, number: int) -> None:
    made = []
    for name in _NAMES:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(base / f"{number}.{name}"))
        sock.listen(8)
        made.append(sock)
    arm = k.Arm(UUID(int=number).bytes, _LEASE, "socket", _NAMES)
    await keepers.ask(arm, tuple(sock.fileno() for sock in made))
    for sock in made:
        sock.close()


async def _wake_some(keepers: Keepers, base: Path, attached: int) -> list[float]:
    """Connect to some, and return sorted for how long the manager's end waited for their keeper's word."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    for keeper in keepers.all:
        await keepers.watch(keeper, theirs.fileno())
    waits, clients = [], []
    for number in random.Random(1).sample(range(attached), _SAMPLE):
        clients.append(client := socket.socket(socket.AF_UNIX))
        started = time.perf_counter()
        client.connect(str(base / f"{number}.data"))
        with trio.fail_after(10):
            data, _ = await receive_message_trio(ours)
        waits.append(time.perf_counter() - started)
        wanted: Any = k.decode_keeper(data)
        assert UUID(bytes=wanted.vtpm).int == number, "another one was woken"
    for sock in (*clients, ours, theirs):
        sock.close()
    return sorted(waits)


def _pss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
