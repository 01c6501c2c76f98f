"""Starts, watches and stops instance processes, through the keeper."""

import logging
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

import trio

from frontend_backend import messages_keeper as k
from frontend_backend.bare_mapping import map_without_descriptor
from frontend_backend.descriptors import close_all
from frontend_backend.errors import RingError
from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import Orders
from manager import orphans
from manager.config import InstanceConfig
from manager.endings import LAST_BREATH, Endings
from manager.errors import BusyError, KeeperError, KeeperRefusedError, ManagerError
from manager.keeper_client import Keeper
from manager.ring_server import RingServer
from manager.running import Running, Stage
from storage.errors import StorageError

_log = logging.getLogger("vtpm.instance")
_UIDS: Final = 65_536  # user ids from uid_base on that instances may get


@dataclass(frozen=True, slots=True)
class Launch:
    """What an instance is started with. `listeners` names the sockets handed to it."""

    vtpm: UUID
    lease: int
    family: str
    frontend: str
    owner_uid: int
    startup: str
    after_reset: str
    listeners: tuple[str, ...]
    epoch: int = 0
    hw_pcrs: int = 0


class Instances:
    """Every instance that this manager runs."""

    def __init__(
        self,
        keeper: Keeper,
        rings: RingServer,
        nursery: trio.Nursery,
        config: InstanceConfig,
        on_end: Callable[[Running, int | None], Awaitable[None]],
    ) -> None:
        """Start instances through `keeper`; `on_end(running, exit status)` is awaited for each that ends."""
        self._keeper, self._rings, self._nursery, self._config = keeper, rings, nursery, config
        self._on_end = on_end
        self.endings = Endings(keeper)
        self.running: dict[UUID, Running] = {}
        self._uids: set[int] = set()
        self._next_uid = 0
        rings.on_hang_up = self._hung_up

    async def start(
        self, launch: Launch, image: int, listeners: list[socket.socket], meanwhile: Callable[[], None]
    ) -> Running:
        """Start an instance; `image` (a locked descriptor) and `listeners` stay the caller's to close.

        `meanwhile` is called once, while the keeper works; what the instance asks is answered only after it. What it
        raises is raised here, and the instance is ended then.

        Raises:
            KeeperError: it was not started.

        """
        front, back = LocalRing.pair(map_without_descriptor)
        uid = self._free_uid()
        page, doorbell = front.descriptors()
        spawn = k.Spawn(
            vtpm=launch.vtpm.bytes,
            lease=launch.lease,
            family=launch.family,
            uid=uid,
            gid=uid,
            frontend=launch.frontend,
            owner_uid=launch.owner_uid,
            manager_uid=os.geteuid(),
            listeners=launch.listeners,
        )
        descriptors = (page, doorbell, back.fileno(), image, *(sock.fileno() for sock in listeners))
        done = _Once(meanwhile)
        try:
            pid = await self._spawn(spawn, descriptors, done.call)
            if done.error is not None:
                await self.endings.end(launch.vtpm, launch.lease)
                raise done.error
        except BaseException as error:
            back.close()
            self._uids.discard(uid)
            if not isinstance(error, KeeperRefusedError):
                await self.endings.end_stray(launch.vtpm, launch.lease)
            raise
        finally:
            front.close()
        back.forget_page_descriptor()
        running = Running(launch.vtpm, launch.lease, pid, back, launch.startup, launch.after_reset, uid or None)
        running.epoch, running.start = launch.epoch, orphans.start_of(pid)
        running.hw_pcrs = launch.hw_pcrs
        self._take_on(running)
        return running

    async def _spawn(self, spawn: k.Spawn, descriptors: tuple[int, ...], meanwhile: Callable[[], None]) -> int:
        """Have the keeper start an instance; returns its process id."""
        reply, received = await self._keeper.ask(spawn, descriptors, meanwhile)
        close_all(received)  # a pidfd: the ring tells of the end, and costs no second descriptor
        if not isinstance(reply, k.Spawned):
            raise KeeperError(f"unexpected answer {type(reply).__name__} to Spawn")
        return reply.pid

    async def adopt(self, kept: k.Kept, after_reset: str, epoch: int = 0, hw_pcrs: int = 0) -> Running:
        """Take an instance over that an earlier manager started.

        Raises:
            KeeperError: the keeper does not hand it over, or what it kept is no ring any more; it was ended then.

        """
        vtpm = UUID(bytes=kept.vtpm)
        page, doorbell, pidfd = await self.endings.fetch(vtpm, kept.lease)
        os.close(pidfd)
        try:
            ring = LocalRing.adopt(page, doorbell, mapper=map_without_descriptor)
        except RingError as error:
            await self.endings.end(vtpm, kept.lease)
            raise KeeperError(f"what the keeper kept is no ring, so the instance was ended: {error}") from error
        ring.forget_page_descriptor()
        # an instance that waits in Load is told what a reset would be told: it never resumes twice
        uid = _uid_of(kept.pid)
        running = Running(vtpm, kept.lease, kept.pid, ring, "failed", after_reset, uid)
        running.epoch, running.start, running.hw_pcrs = epoch, orphans.start_of(kept.pid), hw_pcrs
        running.came_up = True  # if it was still starting, nobody waits for that any more
        self._take_on(running)
        running.ring.ring()  # "ask me": it reports how it is
        return running

    def held(self) -> AbstractContextManager[None]:
        """Let every instance's requests wait meanwhile: see `RingServer.held`."""
        return self._rings.held()

    def _take_on(self, running: Running) -> None:
        self.running[running.vtpm] = running
        if running.uid is not None:
            self._uids.add(running.uid)
        self._rings.add(running)

    def _hung_up(self, running: Running) -> None:
        self._nursery.start_soon(self._clean_up, running)

    async def _clean_up(self, running: Running) -> None:
        """Clean up after an instance whose end of the ring is closed: it has ended, or is made to."""
        await self._rings.quiesce(running)
        status = await self.endings.after_hang_up(running.vtpm, running.lease)
        if self.running.get(running.vtpm) is running:
            del self.running[running.vtpm]
        if running.uid is not None:
            self._uids.discard(running.uid)
        last = running.stage
        if last not in (Stage.STOPPED, Stage.FAILED):
            running.stage = Stage.ENDED
        running.settled.set()
        running.ring.close()
        running.ended.set()
        await self._on_end(running, status)

    def close(self) -> None:
        """Let go of the instances that go on without this manager; when no task uses them any more."""
        for running in self.running.values():
            running.ring.close()
        self.running.clear()

    async def settle(self, running: Running, seconds: float) -> None:
        """Wait until an instance has left STARTING (or a reset is done).

        Raises:
            BusyError: it did not within `seconds`; it goes on trying.

        """
        with trio.move_on_after(seconds):
            await running.settled.wait()
            return
        raise BusyError(f"the instance (pid {running.pid}) did not become ready within {seconds:g} s; look at the log")

    async def stop(self, running: Running) -> bool:
        """Stop an instance cleanly. Returns whether its last state is committed.

        One that does not stop in time is killed: what it acknowledged is durable all the same.
        """
        running.awaited = True
        running.order(Orders.STOP)
        with trio.move_on_after(self._config.stop_timeout):
            await running.ended.wait()
        if not running.ended.is_set():
            _log.error("vTPM %s: did not stop within %g s; killing it", running.vtpm, self._config.stop_timeout)
            await self.kill(running)
        return running.stage is Stage.STOPPED

    async def kill(self, running: Running) -> None:
        """End an instance at once (SIGKILL) and wait until it has been cleaned up after.

        Its end of the ring may outlive it: one that was taken over can have handed it to an accomplice.
        """
        if not running.ended.is_set():
            await self._end_for_certain(running)
            if self._rings.remove(running):
                self._hung_up(running)
        await running.ended.wait()

    async def see_off(self, running: Running) -> None:
        """Wait for the end of an instance that has said its last word; one that lives on is killed."""
        if not await self._ends(running):
            _log.error("vTPM %s: its instance said that it ends, but lives; killing it", running.vtpm)
        await self.kill(running)

    @staticmethod
    async def _ends(running: Running) -> bool:
        with trio.move_on_after(LAST_BREATH):
            await running.ended.wait()
        return running.ended.is_set()

    async def _end_for_certain(self, running: Running) -> None:
        if await self.endings.kill(running.vtpm, running.lease):
            return
        # It outlived its keeper, whose death it has not heeded; a process that has ended does nothing any more.
        if not await self._ends(running):
            await orphans.end(running.pid, running.start)

    def _free_uid(self) -> int:
        """Return a user id that no running instance has, and none had lately; 0 (the keeper's) where we may not choose.

        Raises:
            BusyError: all are taken.

        """
        if os.geteuid() != 0 or not self._config.uid_base:
            return 0
        for _ in range(_UIDS):
            self._next_uid = (self._next_uid + 1) % _UIDS
            uid = self._config.uid_base + self._next_uid
            if uid not in self._uids:
                self._uids.add(uid)
                return uid
        raise BusyError(f"all {_UIDS} user ids for instances are in use; nothing was started. Detach a vTPM first")


def _uid_of(pid: int) -> int | None:
    """Return the real user id of a process (proc(5)), None when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("Uid:")), None)


class _Once:
    """Calls something at most once, keeping what it raises."""

    def __init__(self, what: Callable[[], None]) -> None:
        self._what: Callable[[], None] | None = what
        self.error: Exception | None = None

    def call(self) -> None:
        what, self._what = self._what, None
        if what is None:
            return
        try:
            what()
        except (ManagerError, StorageError, OSError) as error:
            self.error = error
