"""The keeper: outlives the manager, keeps what the next one needs, and is the parent of all instances. Holds no key.

One process, one thread, one epoll loop: an event costs the same however many instances there are. Instances are made
by its spawner, another process, which it starts and replaces. It serves one manager at a time over a SEQPACKET socket
(`messages_keeper`).
"""

import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable
from typing import Final

from frontend_backend.descriptors import PeerCredentials, close_all, receive_message, send_message
from frontend_backend.errors import ChannelClosedError, MessageError, MessageTruncatedError
from frontend_backend.messages_keeper import (
    KeeperFull,
    KeeperRefusal,
    KeeperReply,
    Stopping,
    decode_keeper,
    encode_keeper,
)
from vtpm_instance.errors import InstanceError
from vtpm_instance.journal import note
from vtpm_instance.keeper_requests import Requests
from vtpm_instance.kept import Keeping, KeptInstance
from vtpm_instance.parking import Parking
from vtpm_instance.reserve import Reserve
from vtpm_instance.spawner_link import Spawner, SpawnSettings

STOP_TIMEOUT: Final = 30.0  # seconds that instances have for their clean stop
_MAX_DESCRIPTORS: Final = 16  # of one request
_EXIT_OK: Final = 0
_EXIT_LEFT: Final = 1  # instances were left behind that did not end in time


class Keeper:
    """Serves managers, one after the other, until it is told to stop or nobody needs it any more."""

    def __init__(self, listener: socket.socket, wakeup: int, linger: float, settings: SpawnSettings) -> None:
        """Listen on `listener`; stop when `wakeup` is readable, or when unused for `linger` seconds."""
        self._listener, self._wakeup, self._linger = listener, wakeup, linger
        self._keeping = Keeping()
        self._manager: socket.socket | None = None
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._unused_since = 0.0
        self._stop_by: float | None = None
        self._reserve = Reserve()
        listener.setblocking(False)
        self._watch(listener.fileno(), self._on_connect)
        self._watch(wakeup, self._on_wakeup)
        self._parking = Parking()
        self._watch(self._parking.fileno(), self._parking.on_event)
        self._spawner = Spawner(settings, self._spawner_changed)
        self._requests = Requests(self._keeping, self._parking, self._spawner, self._began, self._on_end)

    def prepare(self) -> None:
        """Start the spawner and wait until it can make instances.

        Raises:
            SpawnerLostError: it cannot.
            OSError: no more processes or descriptors.

        """
        self._spawner.wait_ready()

    def _spawner_changed(self, old: int | None, new: int | None) -> None:
        if old is not None:
            self._forget_descriptor(old)
        if new is not None:
            self._watch(new, self._on_spawner)

    def _on_spawner(self) -> None:
        if self._spawner.on_event():
            self._keeping.end_strays(self._spawner.pids)

    def _watch(self, descriptor: int, handler: Callable[[], None]) -> None:
        self._epoll.register(descriptor, select.EPOLLIN)
        self._handlers[descriptor] = handler

    def _forget_descriptor(self, descriptor: int) -> None:
        """Watch it no longer; to be called before it is closed: others may have it too, and epoll would go on."""
        del self._handlers[descriptor]
        self._epoll.unregister(descriptor)

    # the loop

    def run(self) -> int:
        """Serve, and return the exit status: 0, or 1 when instances did not end in time."""
        self._unused_since = time.monotonic()
        while (left := self._seconds_left()) > 0:
            pause = min(left, self._spawner.seconds_left())
            for descriptor, _ in self._epoll.poll(None if pause == float("inf") else pause):
                handler = self._handlers.get(descriptor)
                if handler is not None:
                    self._call(handler)
            if not self._spawner.seconds_left():
                self._call(self._spawner.have_one_stand_by)
        left_behind = [kept for kept in self._keeping if kept.alive]
        for kept in left_behind:
            note(f"instance of {kept.vtpm} (process {kept.pid}) did not end within {STOP_TIMEOUT:g} s")
        return _EXIT_LEFT if left_behind else _EXIT_OK

    def _call(self, handler: Callable[[], None]) -> None:
        try:
            handler()
        except Exception:  # noqa: BLE001 - every instance dies with this process: a bug may cost a manager its connection
            note(f"a bug, its manager is turned away: {traceback.format_exc()}")  # print_exc can raise itself
            self._drop_manager()

    def _seconds_left(self) -> float:
        """Return how long to wait for the next event, 0 when it is time to end."""
        if self._stop_by is not None:
            alive = any(kept.alive for kept in self._keeping)
            return max(0.0, self._stop_by - time.monotonic()) if alive else 0.0
        if self._manager is not None or any(kept.alive or kept.asleep for kept in self._keeping):
            self._unused_since = time.monotonic()
            return float("inf")
        return max(0.0, self._unused_since + self._linger - time.monotonic())

    def _on_wakeup(self) -> None:
        os.read(self._wakeup, 64)
        self._begin_stop()

    def _begin_stop(self) -> None:
        if self._stop_by is not None:
            return
        self._stop_by = time.monotonic() + STOP_TIMEOUT
        self._requests.stopping = True
        for kept in self._keeping:
            if kept.alive:
                signal.pidfd_send_signal(kept.pidfd, signal.SIGTERM)

    def _began(self, kept: KeptInstance) -> None:
        self._watch(kept.pidfd, lambda: self._on_end(kept))

    def _on_end(self, kept: KeptInstance) -> None:
        kept.reap()
        if not kept.alive:
            self._forget_descriptor(kept.pidfd)

    # the manager's connection

    def _on_connect(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors: without taking the connection off the queue the loop would never rest again.
            note(f"a connection could not be accepted: {error}")
            self._reserve.spend_on(self._listener)
            return
        peer = PeerCredentials.of(sock)
        if peer.uid not in (0, os.geteuid()):
            self._turn_away(sock, f"user {peer.uid} is not the keeper's")
        elif self._manager is not None and not self._manager_has_left():
            self._turn_away(sock, "another manager is connected; stop it first")
        else:
            sock.setblocking(False)
            self._manager = sock
            self._watch(sock.fileno(), self._on_request)

    def _turn_away(self, sock: socket.socket, why: str) -> None:
        note(f"a connection was refused: {why}")
        sock.setblocking(False)
        self._answer(sock, KeeperRefusal(why))
        sock.close()

    def _manager_has_left(self) -> bool:
        """Notice an end of file that is still in the queue, so that a successor is not turned away."""
        assert self._manager is not None
        try:
            left = not self._manager.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            left = True
        if left:
            self._drop_manager()
        return left

    def _drop_manager(self) -> None:
        if self._manager is not None:
            self._forget_descriptor(self._manager.fileno())
            self._manager.close()
            self._manager = None

    def _on_request(self) -> None:
        manager = self._manager
        if manager is None:
            return
        try:
            data, descriptors = receive_message(manager, max_descriptors=_MAX_DESCRIPTORS)
        except BlockingIOError:
            return
        except (ChannelClosedError, ConnectionResetError):
            self._drop_manager()
            return
        except MessageTruncatedError:
            self._reply(KeeperFull("this keeper has no file descriptors left for what came with the request"))
            return
        except MessageError as error:
            self._reply(KeeperRefusal(str(error)))
            return
        self._serve(data, descriptors)

    def _serve(self, data: bytes, descriptors: list[int]) -> None:
        """Answer one request. Descriptors that a refused request brought are closed."""
        handed_out: list[int] = []
        try:
            request = decode_keeper(data)
            answer = self._requests.do(request, descriptors, handed_out)
        except (InstanceError, MessageError, OSError) as error:
            close_all(descriptors)
            answer = KeeperRefusal(str(error))
        self._reply(answer, handed_out)
        if isinstance(answer, Stopping):
            self._begin_stop()

    def _reply(self, message: KeeperReply, descriptors: list[int] | None = None) -> None:
        if self._manager is not None and not self._answer(self._manager, message, descriptors or []):
            self._drop_manager()

    @staticmethod
    def _answer(sock: socket.socket, message: KeeperReply, descriptors: list[int] | None = None) -> bool:
        """Send; returns False when the peer is gone or does not read."""
        try:
            send_message(sock, encode_keeper(message), descriptors or [])
        except OSError as error:
            note(f"an answer could not be delivered: {error}")
            return False
        return True

    def close(self) -> None:
        """Close the manager's connection and the listener, end the spawner."""
        self._spawner.close()
        self._drop_manager()
        self._listener.close()
        self._parking.close()
        self._reserve.close()
        self._epoll.close()
