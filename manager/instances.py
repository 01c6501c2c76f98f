"""Starts, watches and stops instance processes, through the keeper."""

import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

import trio

from frontend_backend import messages_keeper as k
from frontend_backend.descriptors import close_all
from frontend_backend.errors import RingError
from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import Orders
from manager.config import InstanceConfig
from manager.errors import BusyError, KeeperError
from manager.keeper_client import Keeper
from manager.ring_server import RingServer
from manager.running import Running, Stage

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
        self.running: dict[UUID, Running] = {}

    async def start(self, launch: Launch, image: int, listeners: list[socket.socket]) -> Running:
        """Start an instance; `image` (a locked descriptor) and `listeners` stay the caller's to close.

        Raises:
            KeeperError: it was not started.

        """
        front, back = LocalRing.pair()
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
        try:
            reply, received = await self._keeper.ask(spawn, descriptors)
        except KeeperError:
            back.close()
            raise
        finally:
            front.close()
        if not isinstance(reply, k.Spawned) or len(received) != 1:
            close_all(received)
            back.close()
            raise KeeperError(f"unexpected answer {type(reply).__name__} to Spawn")
        back.forget_page_descriptor()
        running = Running(
            launch.vtpm, launch.lease, reply.pid, received[0], back, launch.startup, launch.after_reset, uid or None
        )
        running.epoch = launch.epoch
        self._take_on(running)
        return running

    async def adopt(self, kept: k.Kept, after_reset: str, epoch: int = 0) -> Running:
        """Take an instance over that an earlier manager started.

        Raises:
            KeeperError: the keeper does not hand it over, or what it kept is no ring any more; it was ended then.

        """
        page, doorbell, pidfd = await self._fetch(kept)
        try:
            ring = LocalRing.adopt(page, doorbell)
        except RingError as error:
            await self._end(kept, pidfd)
            raise KeeperError(f"what the keeper kept is no ring, so the instance was ended: {error}") from error
        ring.forget_page_descriptor()
        # an instance that waits in Load is told what a reset would be told: it never resumes twice
        uid = _uid_of(kept.pid)
        running = Running(UUID(bytes=kept.vtpm), kept.lease, kept.pid, pidfd, ring, "failed", after_reset, uid)
        running.epoch = epoch
        self._take_on(running)
        running.ring.ring()  # "ask me": it reports how it is
        return running

    def held(self) -> AbstractContextManager[None]:
        """Let every instance's requests wait meanwhile: see `RingServer.held`."""
        return self._rings.held()

    async def end(self, kept: k.Kept) -> None:
        """End an instance of an earlier manager, unheard, and have the keeper forget it.

        Raises:
            KeeperError: the keeper does not hand it over.

        """
        page, doorbell, pidfd = await self._fetch(kept)
        close_all((page, doorbell))
        await self._end(kept, pidfd)

    async def _end(self, kept: k.Kept, pidfd: int) -> None:
        try:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        await self.forget(UUID(bytes=kept.vtpm), kept.lease)

    async def _fetch(self, kept: k.Kept) -> tuple[int, int, int]:
        """Return (page, doorbell, pidfd) of an instance that the keeper has."""
        reply, received = await self._keeper.ask(k.Fetch(kept.vtpm, kept.lease))
        expected = 3 + len(kept.listeners)
        if not isinstance(reply, k.Fetched) or len(received) != expected:
            close_all(received)
            raise KeeperError(f"unexpected answer {type(reply).__name__} to Fetch")
        page, doorbell, pidfd = received[:3]
        close_all(received[3:])
        return page, doorbell, pidfd

    def _take_on(self, running: Running) -> None:
        self.running[running.vtpm] = running
        self._rings.add(running)
        self._nursery.start_soon(self._watch, running)

    async def _watch(self, running: Running) -> None:
        """Wait for the process to end, then clean up after it."""
        await trio.lowlevel.wait_readable(running.pidfd)
        pidfd, running.pidfd = running.pidfd, -1  # the number may soon be another instance's
        os.close(pidfd)
        await self._rings.quiesce(running)
        if self.running.get(running.vtpm) is running:
            del self.running[running.vtpm]
        last = running.stage
        if last not in (Stage.STOPPED, Stage.FAILED):
            running.stage = Stage.ENDED
        running.settled.set()
        status = await self.forget(running.vtpm, running.lease)
        running.ring.close()
        running.ended.set()
        await self._on_end(running, status)

    def close(self) -> None:
        """Let go of the instances that go on without this manager; when no task uses them any more."""
        for running in self.running.values():
            running.ring.close()
            if running.pidfd >= 0:
                os.close(running.pidfd)
        self.running.clear()

    async def forget(self, vtpm: UUID, lease: int) -> int | None:
        """Let the keeper drop what it keeps of an ended instance; returns its exit status where known."""
        try:
            reply, _ = await self._keeper.ask(k.Forget(vtpm.bytes, lease))
        except KeeperError as error:
            _log.warning("vTPM %s: %s", vtpm, error)
            return None
        return reply.status if isinstance(reply, k.Forgotten) else None

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
        running.order(Orders.STOP)
        with trio.move_on_after(self._config.stop_timeout):
            await running.ended.wait()
        if not running.ended.is_set():
            _log.error("vTPM %s: did not stop within %g s; killing it", running.vtpm, self._config.stop_timeout)
            self.kill(running)
            await running.ended.wait()
        return running.stage is Stage.STOPPED

    @staticmethod
    def kill(running: Running) -> None:
        """End an instance at once (SIGKILL), unless it has ended."""
        with suppress(ProcessLookupError):
            if running.pidfd >= 0:
                signal.pidfd_send_signal(running.pidfd, signal.SIGKILL)

    def _free_uid(self) -> int:
        """Return a user id that no running instance has; 0 (keep the keeper's) where we may not choose."""
        if os.geteuid() != 0 or not self._config.uid_base:
            return 0
        taken = {running.uid for running in self.running.values()}
        return next(uid for uid in range(self._config.uid_base, self._config.uid_base + _UIDS) if uid not in taken)


def _uid_of(pid: int) -> int | None:
    """Return the real user id of a process (proc(5)), None when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("Uid:")), None)


@dataclass(slots=True)
class CrashBudget:
    """How often an instance may crash before it is left down. Time is an argument, in seconds."""

    allowed: int
    period: float
    _crashes: list[float]

    @classmethod
    def of(cls, config: InstanceConfig) -> "CrashBudget":
        """Return a full budget."""
        return cls(config.restarts, config.restart_seconds, [])

    def spend(self, now: float | None = None) -> bool:
        """Count one crash; return whether another start is allowed."""
        moment = time.monotonic() if now is None else now
        self._crashes = [crash for crash in self._crashes if moment - crash < self.period] + [moment]
        return len(self._crashes) <= self.allowed
