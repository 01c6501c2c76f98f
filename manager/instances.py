"""Starts, watches and stops instance processes, through the keeper."""

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Final
from uuid import UUID

import trio

from frontend_backend import messages_keeper as k
from frontend_backend.bare_mapping import map_without_descriptor
from frontend_backend.descriptors import close_all
from frontend_backend.errors import RingError
from frontend_backend.local import LocalRing
from frontend_backend.orders import Orders
from manager import orphans
from manager.config import InstanceConfig
from manager.endings import LAST_BREATH, Endings
from manager.errors import BusyError, KeeperError, KeeperRefusedError
from manager.keepers import Keepers
from manager.launches import Adoption, Launch, Once, uid_of
from manager.ports import Port
from manager.ring_server import RingServer
from manager.running import ENDED, Running, Stage

_log = logging.getLogger("vtpm.instance")
_LAST_STEPS: Final = 30.0  # seconds that one has to hand its connections over, which end if it is killed
_UIDS: Final = 65_536  # user ids from uid_base on that instances may get


class Instances:
    """Every instance that this manager runs."""

    def __init__(
        self,
        keeper: Keepers,
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
        self._silenced: set[Running] = set()  # those that are not heard, though they live
        self._uids: set[int] = set()
        self._next_uid = 0
        self.on_asleep: Callable[[Running, bool], None] = _nobody_listens
        rings.on_hang_up, rings.on_sleep = self._hung_up, self._sleeps

    async def start(
        self, launch: Launch, image: int, listeners: Sequence[Port], meanwhile: Callable[[], None]
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
            localities=launch.localities,
            maintenance=launch.maintenance,
            trace=launch.trace,
            **launch.quota._asdict(),
        )
        descriptors = (page, doorbell, back.fileno(), image, *(port.fileno() for port in listeners))
        done = Once(meanwhile)
        try:
            pid = await self._spawn(k.Wake(spawn) if launch.wakes else spawn, descriptors, done.call)
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
        running.epoch, running.start, running.rest_after = launch.epoch, orphans.start_of(pid), launch.rest_after
        running.hw_pcrs = launch.hw_pcrs
        running.measure, running.measured = launch.measure, launch.measured
        self._take_on(running)
        return running

    def join(self, launch: Launch) -> tuple[Running, LocalRing]:
        """Serve an instance that lives elsewhere; returns its end of the ring, too, to be handed over and closed.

        Raises:
            OSError: out of descriptors or memory.

        """
        front, back = LocalRing.pair(map_without_descriptor)
        back.forget_page_descriptor()
        running = Running(launch.vtpm, launch.lease, 0, back, launch.startup, launch.after_reset, elsewhere=True)
        running.epoch, running.hw_pcrs, running.stage = launch.epoch, launch.hw_pcrs, Stage.WAITING
        running.measure, running.measured, running.terms = launch.measure, launch.measured, launch.terms
        self._take_on(running)
        return running, front

    async def _spawn(self, spawn: k.Spawn | k.Wake, descriptors: tuple[int, ...], meanwhile: Callable[[], None]) -> int:
        """Have the keeper start an instance; returns its process id."""
        reply, received = await self._keeper.ask(spawn, descriptors, meanwhile)
        close_all(received)  # a pidfd: the ring tells of the end, and costs no second descriptor
        if not isinstance(reply, k.Spawned):
            raise KeeperError(f"unexpected answer {type(reply).__name__} to Spawn")
        return reply.pid

    async def adopt(self, kept: k.Kept, adoption: Adoption, *, sleeps: bool = False) -> Running:
        """Take an instance over that an earlier manager started.

        `sleeps`: its record says that the vTPM is hibernated. Then it is about to end, as it was told so by the last
        answer on its page, or it has just been started to wake the vTPM, and has had no answer yet.

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
        # one that waits in Load may go on with a state that nobody has resumed; its record says whether there is one
        uid = uid_of(kept.pid)
        running = Running(vtpm, kept.lease, kept.pid, ring, adoption.startup, adoption.after_reset, uid)
        running.epoch, running.start = adoption.epoch, orphans.start_of(kept.pid)
        running.rest_after, running.hw_pcrs = adoption.rest_after, adoption.hw_pcrs
        running.measure, running.measured = adoption.measure, adoption.measured
        if sleeps and running.back.answered:
            running.stage = Stage.HIBERNATED
            self._sleeps(running)
        running.came_up = True  # if it was still starting, nobody waits for that any more
        self._take_on(running)
        running.ring.ring()  # "ask me": it reports how it is
        return running

    def release_of(self, running: Running) -> str | None:
        """Return the release of the code that an instance runs, None where its keeper does not tell."""
        return self._keeper.release_of(running.vtpm.bytes, running.lease)

    def can_hibernate(self, running: Running) -> bool:
        """Tell whether an instance's code knows how to: releases that do not tell their number do not."""
        return self.release_of(running) is not None

    async def silence(self, running: Running) -> None:
        """Hear an instance no more, and wait until what it asked for last is done; nothing it wants is saved then."""
        if self._rings.remove(running):
            self._silenced.add(running)
        await self._rings.quiesce(running)

    def hear(self, running: Running) -> None:
        """Hear an instance again; what it asked for meanwhile is answered."""
        if running in self._silenced:
            self._silenced.discard(running)
            self._rings.add(running)

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
        sleeps, parked, status = running.stage is Stage.HIBERNATED, False, None
        if running.elsewhere:
            pass  # whether it has ended is not for us to see; it is heard no more
        elif sleeps:
            parked = await self.endings.park(running.vtpm, running.lease)
        else:
            status = await self.endings.after_hang_up(running.vtpm, running.lease)
        if self.running.get(running.vtpm) is running:
            del self.running[running.vtpm]
        if running.uid is not None:
            self._uids.discard(running.uid)
        last = running.stage
        if last not in (Stage.STOPPED, Stage.FAILED, Stage.HIBERNATED):
            running.stage = Stage.ENDED
        running.settled.set()
        running.ring.close()
        if sleeps:
            self.on_asleep(running, parked)
        running.ended.set()
        if not sleeps:
            await self._on_end(running, status)

    def _sleeps(self, running: Running) -> None:
        self._nursery.start_soon(self._see_to_end, running)

    async def _see_to_end(self, running: Running) -> None:
        """Kill one that has committed what it wakes up with, and lives on."""
        if not await self._ends(running, _LAST_STEPS):
            _log.error("vTPM %s: its instance said that it hibernates, but lives; killing it", running.vtpm)
            await self.kill(running)

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
        which = "in its domain" if running.elsewhere else f"(pid {running.pid})"
        raise BusyError(f"the instance {which} did not become ready within {seconds:g} s; look at the log")

    async def stop(self, running: Running) -> bool:
        """Stop an instance cleanly. Returns whether its last state is committed.

        One that does not stop in time is killed: what it acknowledged is durable all the same.
        """
        running.awaited = True
        if running.stage is Stage.WAITING:
            await self.kill(running)
            return True
        running.order(Orders.STOP)
        with trio.move_on_after(self._config.stop_timeout):
            if running.elsewhere:
                await running.last_word()
                await self._ends(running)
            else:
                await running.ended.wait()
        if not running.ended.is_set() and not (running.elsewhere and running.stage in ENDED):
            _log.error("vTPM %s: did not stop within %g s; killing it", running.vtpm, self._config.stop_timeout)
        await self.kill(running)
        return running.stage in (Stage.STOPPED, Stage.HIBERNATED)

    async def kill(self, running: Running) -> None:
        """End an instance at once (SIGKILL) and wait until it has been cleaned up after.

        Its end of the ring may outlive it: one that was taken over can have handed it to an accomplice. Of one that
        lives elsewhere only the ring ends; what it wants to commit after that nobody hears.
        """
        if not running.ended.is_set():
            if not running.elsewhere:
                await self._end_for_certain(running)
            if self._rings.remove(running) or running in self._silenced:
                self._silenced.discard(running)
                self._hung_up(running)
        await running.ended.wait()

    async def see_off(self, running: Running) -> None:
        """Wait for the end of an instance that has said its last word; one that lives on is killed."""
        if not await self._ends(running):
            _log.error("vTPM %s: its instance said that it ends, but lives; killing it", running.vtpm)
        await self.kill(running)

    @staticmethod
    async def _ends(running: Running, seconds: float = LAST_BREATH) -> bool:
        with trio.move_on_after(seconds):
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


def _nobody_listens(_running: Running, _parked: bool) -> None:
    pass
