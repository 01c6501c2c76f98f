"""The lives of the one instance of an instance domain: loaded, started, watched, started again after a crash.

What lives here: when there is an instance, and what it is told. What must not: Xen (`xen_instance_uplink`,
`xen_instance_guest`), what it asks (`xen_instance_relay`), and any decision about its state: that is the manager's.
"""

import logging
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from uuid import UUID

import trio

from frontend_backend import messages_keeper as k
from frontend_backend.descriptors import close_all
from frontend_backend.errors import RingError
from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import InstanceState, LoadReply
from manager.config import InstanceConfig
from manager.crash_budget import CrashBudget
from manager.endings import Endings
from manager.errors import ConflictError, IntegrityError, KeeperError, KeeperRefusedError
from manager.keeper_client import Keeper
from manager.sockets import Owner, listen_on_path
from manager.xen_instance_image import open_image
from manager.xen_instance_relay import Relay
from manager.xen_instance_uplink import Uplink

T = TypeVar("T")
_log = logging.getLogger("vtpm.xen.instance")
FAILED: Final = "failed"  # the startup word of one whose PCRs are lost: failure until a platform reset
_AFTER_STOP: Final = 2.0  # seconds in which a manager that stopped the instance can end the binding, too
RING_SOCKET: Final = "ring.sock"


@dataclass(frozen=True, slots=True)
class LifeSettings:
    """`vtpm` None: whichever the manager hands out. `uid`: the instance's user, 0 for ours."""

    image: Path
    runtime: Path
    vtpm: UUID | None = None
    uid: int = 0


class Life:
    """One vTPM's instances, one after the other. `up` once the first is there."""

    def __init__(self, settings: LifeSettings, uplink: Uplink, keeper: Keeper, config: InstanceConfig) -> None:
        """Load over `uplink`, start through `keeper`; restarts and deadlines as `config` says."""
        self._settings, self._uplink, self._keeper, self._config = settings, uplink, keeper, config
        self._endings = Endings(keeper)
        self._budget = CrashBudget.of(config)
        self._relay: Relay | None = None
        self._changed = trio.Event()
        self._stopping = False
        self._loaded: LoadReply | None = None
        self.alive = False  # whether there is an instance, or may be
        self.startup = ""  # what the instance was told at its start
        self.on_ready: Callable[[], None] = lambda: None

    async def restart(self) -> None:
        """End the instance; the next one answers with a failure until its platform is reset."""
        relay = self._relay
        await self.kill()
        while relay is not None and self._relay is relay:
            await self._changed.wait()

    @property
    def ring_path(self) -> Path:
        """Where the instance hands out rings."""
        return self._settings.runtime / RING_SOCKET

    async def up(self) -> tuple[Relay, LoadReply]:
        """Wait until there is an instance that answers; return what serves it, and the terms of its attachment."""
        while True:
            relay, changed = self._relay, self._changed
            if relay is not None:
                await relay.until_up()
                if not relay.ended and relay is self._relay and self._loaded is not None:
                    return relay, self._loaded
            await changed.wait()

    def on_wish(self) -> None:
        """Have the instance ask the manager."""
        if self._relay is not None:
            self._relay.wish()

    async def stop(self) -> None:
        """End the instance cleanly, or at once when it does not within the configured time; then `run` returns."""
        self._stopping = True
        self._tell()
        if self._relay is None:
            return
        relay = self._relay
        relay.stop()
        with trio.move_on_after(self._config.stop_timeout):
            while self._relay is relay:
                await self._changed.wait()
        if self._relay is relay:
            _log.error("the instance did not stop within %g s; killing it", self._config.stop_timeout)
            await self.kill()

    async def kill(self) -> None:
        """End the instance at once; what it acknowledged is durable. It comes back in failure, unless we stop."""
        if self._loaded is not None:
            await self._endings.kill(UUID(bytes=self._loaded.vtpm), self._loaded.lease)

    async def run(self) -> None:
        """Keep an instance running until `stop`.

        Raises:
            IntegrityError: its state cannot be loaded; nothing was changed.
            DeniedError, ConflictError: see `open_image` and `Uplink.load`.
            KeeperError: it crashes again and again, or cannot be started, or could not save its last state.

        """
        crashed, untold = False, dict[int, str | None]()  # by lease: with another one the manager has decided anew
        while not self._stopping:
            loaded = await self._unless_stopped(self._uplink.load)
            if loaded is None:
                return
            self._check(loaded)
            # of a fresh one nothing was acknowledged yet, so nothing is lost; of one that was told nothing neither
            self.startup = untold.get(loaded.lease) or (FAILED if crashed and not loaded.fresh else loaded.startup)
            self._loaded = loaded
            relay = await self._adopt(loaded) or await self._start(loaded)
            self.alive = True
            await self._live(relay)
            status = await self._endings.after_hang_up(UUID(bytes=loaded.vtpm), loaded.lease)
            self.alive = False
            crashed = not self._ended_well(relay, status)
            untold = {loaded.lease: relay.untold} if crashed else {}
            if crashed and not relay.left_alone:
                await self._pause(status)
            elif not self._stopping:
                _log.info("the manager has stopped the instance, or gone; waiting until it hands the vTPM out again")
                await self._unless_stopped(partial(trio.sleep, _AFTER_STOP))

    async def _unless_stopped(self, wait: Callable[[], Awaitable[T]]) -> T | None:
        """Wait for something; None when we are stopped meanwhile."""
        found = None

        async def watch() -> None:
            while not self._stopping:
                await self._changed.wait()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            found = await wait()
            nursery.cancel_scope.cancel()
        return found

    async def _live(self, relay: Relay) -> None:
        self._relay = relay
        self._tell()
        if self._stopping:
            relay.stop()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._announce, relay)
                await relay.run()
                nursery.cancel_scope.cancel()
        finally:
            self._relay = None
            self._tell()

    async def _announce(self, relay: Relay) -> None:
        await relay.until_up()
        if not relay.ended:
            self.on_ready()

    def _tell(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def _check(self, loaded: LoadReply) -> None:
        wanted = self._settings.vtpm
        if wanted is not None and loaded.vtpm != wanted.bytes:
            raise ConflictError(
                f"the manager hands out vTPM {UUID(bytes=loaded.vtpm)}, and this domain is for {wanted}. Nothing was "
                "started; give the domain's vtpm device and --uuid the same UUID"
            )

    def _ended_well(self, relay: Relay, status: int | None) -> bool:
        """Tell whether an instance ended because it was told to.

        Raises:
            IntegrityError: it could not load its state. KeeperError: told to stop, it could not save the last one.

        """
        report = relay.report
        if report is not None and report.state is InstanceState.FAILED and not relay.left_alone:
            raise IntegrityError(
                f"the vTPM's state cannot be loaded: {report.text}. Every byte of {self._settings.image} is kept. Give "
                "this domain the right image and start again; or give the vTPM up with 'vtpm-reset --yes' in the "
                "manager's domain"
            )
        stopped = report is not None and report.state is InstanceState.STOPPED
        if self._stopping and not (stopped and status in (0, None)):
            raise KeeperError(
                f"the instance did not stop cleanly (status {status}); the last state that it acknowledged counts"
            )
        return stopped

    async def _pause(self, status: int | None) -> None:
        seconds = self._budget.spend()
        if seconds is None:
            raise KeeperError(
                f"the instance ended {self._config.restarts + 1} times within {self._config.restart_seconds:g} s, the "
                f"last time with status {status}; it is left down. What it acknowledged is kept; look at the log"
            )
        _log.error(
            "the instance ended with status %s; it is started again, and answers with a failure until its platform is "
            "reset (its guest starts anew, or vtpm-reset-platform)",
            status,
        )
        await self._unless_stopped(partial(trio.sleep, seconds))

    # starting

    def _listen(self) -> socket.socket:
        """Listen for our own user, in place of what an instance before had."""
        return listen_on_path(self.ring_path, Owner.ourselves(), 0o600, socket.SOCK_SEQPACKET)

    async def _start(self, loaded: LoadReply) -> Relay:
        image = open_image(self._settings.image, loaded)
        try:
            front, back = LocalRing.pair()
            with front, self._listen() as listener:
                page, doorbell = front.descriptors()
                reply, received = await self._keeper.ask(
                    self._spawn(loaded), (page, doorbell, back.fileno(), image, listener.fileno())
                )
                close_all(received)  # a pidfd: the ring tells of the end
        finally:
            os.close(image)
        if not isinstance(reply, k.Spawned):
            raise KeeperError(f"unexpected answer {type(reply).__name__} to Spawn")
        back.forget_page_descriptor()
        _log.info("vTPM %s: started, process %d, startup %s", UUID(bytes=loaded.vtpm), reply.pid, self.startup)
        return Relay(back, self._uplink, self.startup)

    def _spawn(self, loaded: LoadReply) -> k.Spawn:
        return k.Spawn(
            vtpm=loaded.vtpm,
            lease=loaded.lease,
            family=loaded.family,
            uid=self._settings.uid,
            gid=self._settings.uid,
            frontend="xen",
            owner_uid=os.geteuid(),
            manager_uid=os.geteuid(),
            listeners=("ring",),
            localities=loaded.localities,
            maintenance=loaded.maintenance,
            trace=loaded.trace,
        )

    async def _adopt(self, loaded: LoadReply) -> Relay | None:
        """Return what serves an instance that outlived an earlier process of ours; others of it are ended."""
        vtpm = UUID(bytes=loaded.vtpm)
        for kept in await self._keeper.list():
            if kept.vtpm != loaded.vtpm or kept.lease != loaded.lease or not kept.alive:
                await self._clear(UUID(bytes=kept.vtpm), kept)
                continue
            page, doorbell, pidfd = await self._endings.fetch(vtpm, kept.lease)
            os.close(pidfd)
            try:
                ring = LocalRing.adopt(page, doorbell)
            except RingError as error:
                _log.error("what the keeper kept is no ring, so the instance is ended: %s", error)
                await self._endings.end(vtpm, kept.lease)
                return None
            _log.info("vTPM %s: process %d goes on", vtpm, kept.pid)
            self.startup = ""
            return Relay(ring, self._uplink, None)
        return None

    async def _clear(self, vtpm: UUID, kept: k.Kept) -> None:
        with suppress(KeeperRefusedError):
            if kept.alive:
                await self._endings.end(vtpm, kept.lease)
            else:
                await self._endings.forget(vtpm, kept.lease)
