"""Lives of throw-away instances in the spawner, before its first fork: each walks the path that real ones will walk.

The instance is the real one, run in this process; a child of it plays manager and guest. The state lies in a memfd, its
key dies with the child. What lives here: the play. Why it is played: `warm`.
"""

import os
import select
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, NoReturn
from uuid import UUID

from frontend_backend.front import RingFrontEnd
from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import (
    Commit,
    CommitReply,
    Hibernate,
    LoadReply,
    Reply,
    ReportReply,
    decode_request,
    encode_reply,
    refusal_for_malformed,
)
from frontend_backend.messages_instance import Load as LoadRequest
from frontend_backend.orders import Orders
from frontend_backend.ring import BackRing, Request
from frontend_backend.tpmhdr import Tag, TpmFamily, command
from storage.state_image import Family, StateImage
from vtpm_instance import instance
from vtpm_instance.confine import die_with_parent
from vtpm_instance.control import FrontEnd
from vtpm_instance.errors import RehearsalError
from vtpm_instance.handover import Handed, Kind
from vtpm_instance.order import InstanceOrder

SECONDS: Final = 20.0  # without progress, before a rehearsal is given up
_ALL_DESCRIPTORS: Final = 1 << 20
_NOBODY: Final = UUID(int=0)
_LEASE: Final = 1
_RECORD: Final = struct.Struct("32s32sQ")  # key, digest, generation
_GET_INFO: Final = struct.pack(">IQII", 0x12, 1, 0, 0)  # control channel: CMD_GET_INFO, SWTPM_INFO_TPMSPECIFICATION
_NV_INDEX: Final = 0x1500016
_PASSWORD: Final = bytes.fromhex("00000009 40000009 0000 00 0000")  # an authorisation area: TPM_RS_PW, empty


def _nv(code: int, handles: tuple[int, ...], parameters: bytes) -> bytes:
    return command(code, struct.pack(f">{len(handles)}I", *handles) + _PASSWORD + parameters, Tag.TPM2_SESSIONS)


# GetRandom, GetCapability, PCR_Read, PCR_Extend, NV_DefineSpace, NV_Write, NV_Read (TPM 2.0 Part 3)
_COMMANDS: Final = (
    command(0x17B, struct.pack(">H", 32)),
    command(0x17A, struct.pack(">III", 6, 0x100, 8)),
    command(0x17E, bytes.fromhex("00000001 000b 03 010000")),
    _nv(0x182, (16,), bytes.fromhex("00000001 000b") + bytes(32)),
    _nv(0x12A, (0x40000001,), struct.pack(">HHIHIHH", 0, 14, _NV_INDEX, 0x000B, 0x00040004, 0, 64)),
    _nv(0x137, (_NV_INDEX, _NV_INDEX), struct.pack(">H", 64) + bytes(64) + struct.pack(">H", 0)),
    _nv(0x14E, (_NV_INDEX, _NV_INDEX), struct.pack(">HH", 64, 0)),
)


@dataclass(frozen=True, slots=True)
class State:
    """What is known of the last save of a throw-away vTPM; key, digest and generation are empty when it is fresh.

    `lives` counts those that have ended: every other one hibernates, and the one after it resumes.
    """

    image: int
    key: bytes = b""
    digest: bytes = b""
    generation: int = 0
    lives: int = 0


def fresh() -> State:
    """Return a TPM 2.0 that was never started, its image in memory; see `release`."""
    image = os.memfd_create("vtpm-rehearsal", os.MFD_CLOEXEC)
    StateImage.create(image, _NOBODY, _NOBODY, Family.TPM20)
    return State(image)


def release(state: State) -> None:
    """Give its memory back."""
    os.close(state.image)


def live_once(state: State, look_at: Callable[[int], None] | None = None) -> State:
    """Let an instance live from its start until it stops cleanly or hibernates; returns the state it left.

    With `look_at` it gets one command; when that is answered this is called in another process, with its process id.

    Raises:
        RehearsalError: it did not end as it should; no real one would.

    """
    front, back = LocalRing.pair()
    listeners = {name: _listener(kind) for name, kind in _KINDS.items()}
    guest, connected = socket.socketpair()
    told, tell = os.pipe2(os.O_CLOEXEC)
    spawner = os.getpid()
    player = os.fork()
    if player == 0:
        front.close()  # a copy here would keep the instance's end open after it has stopped
        connected.close()
        _child_plays(state, back, guest, listeners, tell, spawner, look_at)
    witness = 0 if look_at is None else _witness(spawner)
    guest.close()
    os.close(tell)
    back.close()
    page, *doorbell = (os.dup(descriptor) for descriptor in front.descriptors())
    front.close()
    order = InstanceOrder(
        vtpm=_NOBODY,
        lease=_LEASE,
        family=TpmFamily.TPM_2_0,
        front_end=FrontEnd.SOCKET,
        owner_uid=0,
        manager_uid=os.geteuid(),
        page=page,
        doorbell=doorbell[0],
        image=state.image,
        listeners={name: listener.detach() for name, listener in listeners.items()},
        connections=[Handed(Kind.DATA, (connected.detach(),))],
    )
    try:
        status = instance.run(order)
        left = os.read(told, _RECORD.size)
    finally:
        os.close(told)
        _, ended = os.waitpid(player, 0)
        if witness:
            os.kill(witness, signal.SIGKILL)
            os.waitpid(witness, 0)
    if status or ended or len(left) != _RECORD.size:
        raise RehearsalError(status, ended)
    key, digest, generation = _RECORD.unpack(left)
    return replace(state, key=key, digest=digest, generation=generation, lives=state.lives + 1)


def _witness(spawner: int) -> int:
    """Share every page with another process from now on, so that only what is written after this is nobody else's."""
    witness = os.fork()
    if witness == 0:
        try:
            os.closerange(3, _ALL_DESCRIPTORS)
            while die_with_parent(spawner):
                signal.pause()
        finally:
            os._exit(1)
    return witness


_KINDS: Final = {"data": socket.SOCK_STREAM, "control": socket.SOCK_STREAM, "ring": socket.SOCK_SEQPACKET}


def _listener(kind: socket.SocketKind) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind("")  # a name of the kernel's choice, without a file (unix(7), autobind)
    listener.listen()
    return listener


def _child_plays(
    state: State,
    ring: LocalRing,
    guest: socket.socket,
    listeners: dict[str, socket.socket],
    tell: int,
    spawner: int,
    look_at: Callable[[int], None] | None,
) -> NoReturn:
    """Be manager and guest until the instance has stopped."""
    status = 1
    try:
        if not die_with_parent(spawner):  # living on, it would keep the keeper from noticing the end of the spawner
            os._exit(status)
        signal.alarm(int(SECONDS))
        play = _Play(state, ring)
        places = {name: listener.getsockname() for name, listener in listeners.items()}
        if look_at is None:
            play.guest(guest, places)
        else:
            play.one_command(places["data"])
            look_at(spawner)
        play.end(Orders.STOP if state.lives % 2 else Orders.HIBERNATE)
        os.write(tell, _RECORD.pack(play.state.key, play.state.digest, play.state.generation))
        status = 0
    finally:
        os._exit(status)


class _Play:
    """Manager and guest of one instance."""

    def __init__(self, state: State, ring: LocalRing) -> None:
        self.state, self._ring = state, ring
        self._back = BackRing(ring.page, refusal_for_malformed)
        self._orders = Orders.NONE

    def guest(self, kept: socket.socket, places: dict[str, bytes | str]) -> None:
        """Use every way in; `kept` is a connection from before, and stays open."""
        with _connected(places["data"]) as data:
            for packet in _COMMANDS:
                for _ in range(2):
                    self._exchange(data, packet)
                    self._exchange(kept, packet)
        with _connected(places["control"]) as control:
            self._exchange(control, _GET_INFO)
        front = RingFrontEnd.connect(os.fsdecode(places["ring"]))
        for _ in range(2):
            front.transact(_COMMANDS[0])
        front.close()

    def one_command(self, data: bytes | str) -> None:
        """Send what a guest may send first."""
        with _connected(data) as sock:
            self._exchange(sock, _COMMANDS[0])

    def _exchange(self, sock: socket.socket, packet: bytes) -> None:
        sock.sendall(packet)
        while not self._wait_for(sock.fileno()):
            pass
        sock.recv(8192)

    def _wait_for(self, descriptor: int | None) -> bool:
        """Wait for the instance, serving it as its manager; returns whether `descriptor` is readable."""
        poll = select.poll()
        poll.register(self._ring.fileno(), select.POLLIN)
        if descriptor is not None:
            poll.register(descriptor, select.POLLIN)
        ready = dict(poll.poll())
        if self._ring.fileno() in ready and self._ring.drain():
            self._serve()
        return descriptor in ready

    def _serve(self) -> None:
        request = self._back.take()
        if isinstance(request, Request):
            self._back.finish(encode_reply(self._reply(request.packet), self._orders))
            self._ring.ring()

    def _reply(self, packet: bytes) -> Reply:
        state = self.state
        match decode_request(packet):
            case LoadRequest():
                new = not state.generation
                startup = "clear" if new else "state"
                return LoadReply(
                    _NOBODY.bytes,
                    TpmFamily.TPM_2_0.value,
                    _LEASE,
                    new,
                    state.key,
                    state.digest,
                    state.generation,
                    startup,
                    9.0,
                )
            case Commit(generation, key, digest) | Hibernate(generation, key, digest):
                self.state = replace(state, key=key, digest=digest, generation=generation)
                return CommitReply(generation)
            case _:
                return ReportReply()

    def end(self, orders: Orders) -> None:
        """Order the end, in each answer until it is obeyed, and serve until the instance is gone."""
        self._orders = orders
        self._ring.ring()
        poll = select.poll()
        poll.register(self._ring.fileno(), select.POLLIN)
        while True:
            poll.poll()
            if not self._ring.drain():
                return
            self._serve()


def _connected(address: bytes | str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(address)
    return sock
