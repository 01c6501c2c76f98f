"""Sleeping vTPMs in the keeper: who wants something is told of once, who hangs up wakes nobody, nothing is read."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from uuid import UUID, uuid4

import pytest

from frontend_backend.descriptors import close_all, receive_message, send_message
from frontend_backend.doorbell import PipeDoorbell, SocketDoorbell
from frontend_backend.errors import ChannelClosedError
from frontend_backend.local import LocalRing
from frontend_backend.messages_keeper import Spawn, Wake, Wanted, Watch, decode_keeper
from vtpm_instance.errors import KeeperStoppingError
from vtpm_instance.handover import Handed, Kind, pack
from vtpm_instance.keeper_requests import Requests
from vtpm_instance.kept import Keeping, KeptInstance
from vtpm_instance.parking import MOST_MESSAGES, Parking
from vtpm_instance.spawner_link import Spawner, SpawnSettings


class Lot:
    """A parking with a manager that listens, and what was made for a test."""

    def __init__(self) -> None:
        self.parking = Parking()
        self.close_later: list[Callable[[], None]] = [self.parking.close]
        self.notices: socket.socket | None = None
        self.kept: list[KeptInstance] = []

    def tell(self) -> None:
        """Be a manager, the next one perhaps."""
        if self.notices is not None:
            self.notices.close()
        self.notices, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.notices.setblocking(False)
        self.parking.tell(theirs, self.kept)

    def socket(self) -> tuple[socket.socket, socket.socket]:
        pair = socket.socketpair()
        self.close_later += [pair[0].close, pair[1].close]
        return pair

    def sleeper(self, *handed: Handed, rings: int = 0, unheard: int = 0) -> tuple[KeptInstance, bytes | str]:
        """One that went to sleep, having left these; and where its guests connect."""
        ours, theirs = SocketDoorbell.pair()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")
        listener.listen()
        for _ in range(rings):
            theirs.ring()
        for _ in range(unheard):
            ours.ring()
        if handed:
            theirs.hand_over(*pack(handed))
        theirs.close()
        page, pidfd = os.memfd_create("page"), os.pidfd_open(os.getpid())
        doorbell = ours._sock.detach()
        kept = KeptInstance(uuid4(), 1, 77, pidfd, "socket", page, doorbell, {"data": listener.fileno()}, status=0)
        self.close_later.append(listener.close)
        self.kept.append(kept)
        assert self.parking.fall_asleep(kept) == len(kept.connections)
        assert (kept.asleep, kept.page, kept.doorbell, kept.pidfd) == (True, -1, -1, -1)
        return kept, listener.getsockname()

    def wanted(self) -> list[UUID]:
        """What the manager is told now."""
        self.parking.on_event()
        assert self.notices is not None
        told = []
        with suppress(BlockingIOError):
            while True:
                notice = decode_keeper(receive_message(self.notices)[0])
                assert isinstance(notice, Wanted)
                told.append(UUID(bytes=notice.vtpm))
        return told

    def close(self) -> None:
        if self.notices is not None:
            self.notices.close()
        for close in self.close_later:
            close()


@pytest.fixture
def lot() -> Iterator[Lot]:
    made = Lot()
    made.tell()
    yield made
    made.close()


def given(lot: Lot, kind: Kind = Kind.DATA, note: int = 0) -> tuple[Handed, socket.socket]:
    """A connection to hand over (a copy: what is sent stays the sender's), and its guest's end."""
    ours, guest = lot.socket()
    return Handed(kind, (ours.fileno(),), note), guest


def test_a_command_on_a_connection_is_told_of_once_and_stays_unread(lot: Lot) -> None:
    handed, guest = given(lot, Kind.CONTROL, 1)
    kept, _ = lot.sleeper(handed, rings=3)
    assert [(each.kind, each.note) for each in kept.connections] == [(Kind.CONTROL, 1)]
    assert lot.wanted() == []
    guest.sendall(b"command")
    assert lot.wanted() == [kept.vtpm]
    guest.sendall(b"more")
    assert lot.wanted() == []
    with socket.socket(fileno=os.dup(kept.connections[0].watched)) as sock:
        assert sock.recv(64) == b"commandmore"


def test_connections_are_taken_in_though_the_instance_ended_without_hearing_the_last_ring(lot: Lot) -> None:
    """The kernel then tells of a reset before it gives out what was sent (unix(7) sockets)."""
    handed, guest = given(lot)
    kept, _ = lot.sleeper(handed, rings=2, unheard=2)
    assert len(kept.connections) == 1
    guest.sendall(b"command")
    assert lot.wanted() == [kept.vtpm]


def test_an_accomplice_with_a_dead_instances_doorbell_does_not_hold_the_keeper_up(lot: Lot) -> None:
    """Somebody to whom it handed its end can ring faster than we read: then there is always one more to be read."""
    ours, theirs = SocketDoorbell.pair()
    theirs._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    rung = 0
    with suppress(BlockingIOError):
        while True:
            theirs._sock.send(b"r")
            rung += 1
    assert rung > MOST_MESSAGES, "or the limit is not tried"
    rest = ours._sock.dup()
    lot.close_later += [rest.close, theirs.close]
    page, pidfd = os.memfd_create("page"), os.pidfd_open(os.getpid())
    lot.parking.fall_asleep(KeptInstance(uuid4(), 1, 77, pidfd, "socket", page, ours._sock.detach(), {}, status=0))
    left = 0
    with suppress(BlockingIOError):
        while rest.recv(1, socket.MSG_DONTWAIT):
            left += 1
    assert left == rung - MOST_MESSAGES


def test_one_that_could_not_be_woken_is_told_to_the_next_manager(lot: Lot) -> None:
    """Its manager dies before it has it watched again: the command must not wait for ever."""
    keeping = Keeping()
    link = Spawner(SpawnSettings(), lambda _old, _new: None)
    requests = Requests(keeping, lot.parking, link, lambda _kept: None, lambda _kept: None)
    handed, guest = given(lot)
    kept, _ = lot.sleeper(handed)
    keeping.add(kept)
    guest.sendall(b"command")
    assert lot.wanted() == [kept.vtpm]
    requests.stopping = True  # whatever it is: no instance is made
    spawn = Spawn(kept.vtpm.bytes, kept.lease, "2.0", 0, 0, "socket", 0, 0, ())
    descriptors = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(4)]
    with pytest.raises(KeeperStoppingError):
        requests.do(Wake(spawn), descriptors, [])
    close_all(descriptors)
    assert lot.wanted() == []
    assert lot.notices is not None
    lot.notices.close()
    lot.notices, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lot.notices.setblocking(False)
    requests.do(Watch(), [theirs.detach()], [])
    assert lot.wanted() == [kept.vtpm]


def test_one_that_is_watched_again_is_told_of_again(lot: Lot) -> None:
    kept, address = lot.sleeper()
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(address)
        assert lot.wanted() == [kept.vtpm]
        assert lot.wanted() == []
        lot.parking.watch(kept)
        assert lot.wanted() == [kept.vtpm]
        lot.parking.watch(kept)
        lot.parking.leave(kept)
        assert lot.wanted() == []


def test_who_hangs_up_wakes_nobody_and_is_let_go(lot: Lot) -> None:
    (first, leaves), (second, stays) = given(lot), given(lot)
    kept, _ = lot.sleeper(first, second)
    left = kept.connections[0].watched
    leaves.close()
    assert lot.wanted() == []
    assert len(kept.connections) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(left)
    stays.sendall(b"command")
    assert lot.wanted() == [kept.vtpm], "the other one is watched still"


def test_who_hangs_up_with_a_command_unread_is_served(lot: Lot) -> None:
    handed, guest = given(lot)
    kept, _ = lot.sleeper(handed)
    guest.sendall(b"command")
    guest.close()
    assert lot.wanted() == [kept.vtpm]
    assert len(kept.connections) == 1


def test_a_ring_wakes_when_it_is_rung_and_not_when_its_guest_leaves(lot: Lot) -> None:
    front, back = LocalRing.pair(doorbells=PipeDoorbell.pair)
    kept, _ = lot.sleeper(Handed(Kind.RING, back.descriptors()))
    back.close()
    assert lot.wanted() == []
    front.ring()
    assert lot.wanted() == [kept.vtpm]
    with os.fdopen(os.dup(kept.connections[0].watched), "rb", buffering=0) as pipe:
        assert pipe.read(1) == b"\0"
    lot.parking.watch(kept)
    front.close()
    assert lot.wanted() == []
    assert kept.connections == []


def test_what_is_wanted_without_a_manager_the_next_one_is_told(lot: Lot) -> None:
    kept, address = lot.sleeper()
    assert lot.notices is not None
    lot.notices.close()
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(address)
        for _ in range(3):
            lot.parking.on_event()
        lot.tell()
        assert lot.wanted() == [kept.vtpm]


def test_what_a_manager_was_told_and_died_over_the_next_one_is_told(lot: Lot) -> None:
    kept, address = lot.sleeper()
    other, _ = lot.sleeper()
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(address)
        assert lot.wanted() == [kept.vtpm]
        lot.tell()
        assert lot.wanted() == [kept.vtpm]
        lot.parking.leave(kept)
        lot.kept.remove(kept)
        lot.tell()
        assert lot.wanted() == [], "it was woken"
    assert other.asleep


def test_more_than_the_manager_takes_at_once_is_told_later(lot: Lot) -> None:
    sleepers = [lot.sleeper() for _ in range(600)]
    guests = [socket.socket(socket.AF_UNIX) for _ in sleepers]
    for guest, (_, address) in zip(guests, sleepers, strict=True):
        guest.connect(address)
    lot.parking.on_event()
    lot.parking.on_event()
    lot.parking.on_event()
    told: list[UUID] = []
    while len(told) < len(sleepers):
        more = lot.wanted()
        assert more, "it goes on as soon as there is room"
        told += more
    assert sorted(told) == sorted(kept.vtpm for kept, _ in sleepers)
    for guest in guests:
        guest.close()


@pytest.mark.parametrize("evil", ["file", "twice", "truncated", "nonsense"])
def test_what_a_hostile_instance_leaves_is_dropped_whole(lot: Lot, evil: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = SocketDoorbell.pair()
    with open("/dev/null", "rb") as null:
        good, _guest = given(lot)
        if evil == "file":
            theirs.hand_over(*pack([good, Handed(Kind.DATA, (null.fileno(),))]))
        elif evil == "truncated":
            send_message(theirs._sock, b"x" * 100, [null.fileno()] * 20)
        elif evil == "nonsense":
            send_message(theirs._sock, b"HNDO\xff", [null.fileno()])
        else:
            theirs.hand_over(*pack([good]))
            theirs.hand_over(*pack([good]))
    theirs.close()
    made = os.memfd_create("page"), os.pidfd_open(os.getpid())
    kept = KeptInstance(uuid4(), 1, 77, made[1], "socket", made[0], ours._sock.detach(), {}, status=0)
    assert lot.parking.fall_asleep(kept) == (1 if evil == "twice" else 0)
    for each in kept.connections:
        lot.parking.leave(kept)
        os.close(each.watched)
    assert len(os.listdir("/proc/self/fd")) == before + 2, "but for the good one's two ends"


def test_a_second_manager_takes_the_place_of_the_first(lot: Lot) -> None:
    first = lot.notices
    assert first is not None
    lot.notices = None
    lot.tell()
    with pytest.raises(ChannelClosedError):
        receive_message(first)
    first.close()
    kept, address = lot.sleeper()
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(address)
        assert lot.wanted() == [kept.vtpm]
