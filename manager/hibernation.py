"""When vTPMs go to sleep and wake: idle ones are sent to sleep, those that a guest wants are woken.

How idle an instance was it tells itself when it is rung for (a Report with the reason "idle"): nothing is counted or
timed while commands run. Which are wanted the keepers tell, each on a socket of its own; who is wanted is not watched
any more until it was woken, or watched again.
"""

import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final
from uuid import UUID

import trio

from frontend_backend import messages_keeper as k
from frontend_backend.channel_trio import receive_message_trio
from frontend_backend.errors import ChannelClosedError, MessageError
from frontend_backend.messages_instance import AWAKE
from frontend_backend.orders import Orders
from manager.attachments import Attachments
from manager.errors import BusyError, ConflictError, KeeperError, KeeperRefusedError, ManagerError, QuarantinedError
from manager.frequent_events import FrequentEvents
from manager.instances import Instances
from manager.keeper_client import Keeper
from manager.keepers import Keepers
from manager.memory import private_bytes
from manager.registry import Registry
from manager.running import Running, Stage
from manager.sleepers import LONGEST_RETRY, is_hibernated
from storage.catalogue import AttachmentRow, VtpmRow
from storage.errors import StorageError

_log = logging.getLogger("vtpm.life")
LOOKS: Final = 4  # at an instance, in the time after which it is hibernated, that must find it idle
_LONGEST_PAUSE: Final = 1.0  # seconds between two looks at who is to be asked
_SHORTEST_PAUSE: Final = 0.1
ORDER_SECONDS: Final = 30.0  # that an instance may take to go to sleep, or to say why not: an RSA key takes some
_RETRY_SECONDS: Final = 1.0  # before a keeper that did not answer is asked again


class Hibernation:
    """Sends vTPMs to sleep and wakes them."""

    def __init__(
        self,
        registry: Registry,
        attachments: Attachments,
        instances: Instances,
        keepers: Keepers,
        nursery: trio.Nursery,
        later: Callable[[VtpmRow, str], Awaitable[None]],
    ) -> None:
        """Work on `attachments`; `later` starts one again whose instance did not come up (Supervision.later)."""
        self._registry, self._catalogue = registry, registry.catalogue
        self._attachments, self._instances, self._keepers = attachments, instances, keepers
        self._sleepers, self._nursery, self._later = attachments.sleepers, nursery, later
        self.events = FrequentEvents(self._catalogue)
        self._early: set[UUID] = set()  # wanted before we knew that they sleep
        instances.on_asleep = self._fell_asleep
        self._listened_to: set[Keeper] = set()
        keepers.on_new = self._listen_to_another

    # falling asleep

    def _fell_asleep(self, running: Running, parked: bool) -> None:
        """Take note of an instance that hibernated; `parked` says whether its keeper has its sockets."""
        self._sleepers.fell_asleep(running)
        text = f"instance {running.pid} saved everything and ended"
        self.events.note("hibernated", running.vtpm, text, time.time())
        if not parked or running.vtpm in self._early:
            self._nursery.start_soon(self._wake if parked else self._watch_anew, running.vtpm)
        self._early.discard(running.vtpm)

    async def hibernate(self, row: VtpmRow) -> None:
        """Hibernate a vTPM now; returns when it sleeps.

        Raises:
            ConflictError: it is not attached, or there is nothing to hibernate. BusyError: not now.

        """
        async with self._attachments.lock(row.uuid):
            attachment = self._catalogue.find_attachment(row.uuid)
            if attachment is None:
                raise ConflictError(f"vTPM {row.name} is not attached, so nothing of it is in memory")
            if row.uuid in self._sleepers:
                return
            if attachment.instance_domain:
                raise ConflictError(
                    f"the instance of vTPM {row.name} lives in a domain of its own: it cannot hibernate"
                )
            running = self._fit(row, self._attachments.running(row.uuid))
            running.private_bytes = private_bytes(running.pid)
            running.order(Orders.HIBERNATE)
            with trio.move_on_after(ORDER_SECONDS):
                await running.answered(AWAKE)
                if running.stage is Stage.HIBERNATED:
                    await running.ended.wait()
            if row.uuid not in self._sleepers:
                self._say_why_not(row, running)

    def _fit(self, row: VtpmRow, running: Running | None) -> Running:
        if running is None:
            why = self._attachments.reason(row.uuid) or "look at the log"
            raise ConflictError(f"vTPM {row.name} is down, so there is nothing to hibernate: {why}")
        if running.stage is Stage.NEEDS_RESET:
            raise ConflictError(
                f"vTPM {row.name} answers failure until a platform reset, so there is nothing to hibernate; run "
                f"'vtpm-reset-platform {row.name}' first"
            )
        if running.stage is not Stage.RUNNING:
            raise BusyError(f"vTPM {row.name} is {running.stage.value}; nothing was changed. Try again")
        if not self._instances.can_hibernate(running):
            raise ConflictError(
                f"the instance of vTPM {row.name} runs code of before an upgrade, which cannot hibernate; "
                f"'vtpm-reset-platform {row.name}' replaces it"
            )
        return running

    @staticmethod
    def _say_why_not(row: VtpmRow, running: Running) -> None:
        running.orders &= ~Orders.HIBERNATE
        report = running.report
        if report is not None and report.reason == AWAKE:
            raise BusyError(f"vTPM {row.name} was not hibernated: {report.text}. Nothing was changed; try again later")
        raise BusyError(
            f"vTPM {row.name} does not hibernate just now: for {ORDER_SECONDS:g} s its instance has not said why, so a "
            f"command of its guest runs, or this machine is very busy. Nothing is lost; try again later"
        )

    async def run_idle(self) -> None:
        """Ask instances how idle they are, and hibernate those that were it long enough, until cancelled."""
        while True:
            shortest = min(
                (one.rest_after for one in self._instances.running.values() if one.rest_after), default=math.inf
            )
            await trio.sleep(max(_SHORTEST_PAUSE, min(_LONGEST_PAUSE, shortest / LOOKS)))
            now = trio.current_time()
            for running in list(self._instances.running.values()):
                if running.rest_after and running.stage is Stage.RUNNING:
                    self._look_at(running, now)

    def _look_at(self, running: Running, now: float) -> None:
        if now < running.look_next or not self._instances.can_hibernate(running):
            return
        running.look_next = now + running.rest_after / LOOKS
        if running.idle_reports < LOOKS:
            running.asked = True
            running.ring.ring()  # "ask me": it reports how it is
            return
        running.idle_reports = 0
        running.private_bytes = private_bytes(running.pid)
        running.order(Orders.HIBERNATE)

    # waking

    def listen(self) -> None:
        """Listen to every keeper there is, in tasks of their own."""
        for keeper in self._keepers.all:
            self._listen_to_another(keeper)

    def _listen_to_another(self, keeper: Keeper) -> None:
        # once: a keeper tells on one socket, so of two listeners each would take the other's place for ever
        if keeper not in self._listened_to:
            self._listened_to.add(keeper)
            self._nursery.start_soon(self._listen, keeper)

    async def _listen(self, keeper: Keeper) -> None:
        """Wake whom a keeper tells of, until it or this manager ends; those that a dead keeper had are watched anew."""
        while keeper in self._keepers.all and not self._attachments.stopping:
            try:
                await self._listen_once(keeper)
            except KeeperRefusedError as error:
                _log.warning("the keeper at %s cannot tell of hibernated vTPMs: %s", keeper.path, error)
                return  # of before there was hibernation
            except KeeperError as error:
                _log.warning("the keeper at %s does not answer just now: %s", keeper.path, error)
                await trio.sleep(_RETRY_SECONDS)

    async def _listen_once(self, keeper: Keeper) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                ours.setblocking(False)
                await self._keepers.watch(keeper, theirs.fileno())
            self._watch_those_left()
            await self._take_notices(ours)

    def _watch_those_left(self) -> None:
        for vtpm, entry in self._sleepers.asleep.items():
            if not self._keepers.has(vtpm.bytes, entry.lease):
                self._nursery.start_soon(self._watch_anew, vtpm)

    async def _take_notices(self, sock: socket.socket) -> None:
        while True:
            try:
                data, _ = await receive_message_trio(sock)
                notice = k.decode_keeper(data)
            except (ChannelClosedError, OSError):
                return
            except MessageError as error:
                _log.error("a keeper's notice cannot be read: %s", error)
                continue
            if isinstance(notice, k.Wanted):
                self._nursery.start_soon(self._wake, UUID(bytes=notice.vtpm))

    async def _wake(self, vtpm: UUID) -> None:
        """Wake a vTPM that a guest wants something of; whatever goes wrong is logged and shown with it."""
        running = self._attachments.running(vtpm)
        if running is not None and running.stage is Stage.HIBERNATED:
            self._early.add(vtpm)
            return
        async with self._attachments.lock(vtpm):
            try:
                rows = self._rows(vtpm)
            except StorageError as error:
                self._catalogue_is_away(vtpm, error, self._wake)
                return
            if rows is None:
                return
            row, attachment = rows
            try:
                running = await self._attachments.wake(row, attachment)
            except (ManagerError, StorageError, OSError) as error:
                self._not_woken(row, attachment, error)
                return
        self._note_resumed(row, running)

    async def awake(self, row: VtpmRow) -> Running | None:
        """Return a vTPM's instance for who needs it, woken where it sleeps; the caller holds the vTPM's lock."""
        before = self._attachments.running(row.uuid)
        running = await self._attachments.awake(row)
        if running is not None and running is not before:
            self._note_resumed(row, running)
        return running

    def _note_resumed(self, row: VtpmRow, running: Running) -> None:
        self.events.note("resumed", row.uuid, f"{row.name}: instance {running.pid} goes on with it", time.time())

    def _rows(self, vtpm: UUID) -> tuple[VtpmRow, AttachmentRow] | None:
        """Return the rows of a vTPM that sleeps, None where it does not, or nothing is to be started any more."""
        if vtpm not in self._sleepers or self._attachments.stopping:
            return None
        return self._catalogue.find_attached(vtpm)

    def _catalogue_is_away(self, vtpm: UUID, error: StorageError, again: Callable[[UUID], Awaitable[None]]) -> None:
        """Try once more after a pause: whoever wants it waits."""

        async def later() -> None:
            await trio.sleep(LONGEST_RETRY / 2)
            await again(vtpm)

        _log.error("vTPM %s: it is hibernated, and the catalogue cannot be read: %s", vtpm, error)
        self._nursery.start_soon(later)

    def _not_woken(self, row: VtpmRow, attachment: AttachmentRow, error: Exception) -> None:
        _log.error("vTPM %s: it was wanted, and did not wake: %s", row.uuid, error)
        self._attachments.note_down(row.uuid, f"it was wanted, and did not wake: {error}")
        entry = self._sleepers.asleep.get(row.uuid)
        if entry is not None:
            self._nursery.start_soon(self._watch_later, row, attachment, entry.pause())
        elif not isinstance(error, QuarantinedError):
            self._nursery.start_soon(self._later, row, str(error))

    async def _watch_later(self, row: VtpmRow, attachment: AttachmentRow, pause: float) -> None:
        """Have one watched again after a pause: what it was wanted for wakes it again."""
        await trio.sleep(pause)
        async with self._attachments.lock(row.uuid):
            if row.uuid not in self._sleepers or self._attachments.stopping:
                return
            try:
                await self._sleepers.watch_again(row, attachment)
            except (ManagerError, OSError) as error:
                self._not_woken(row, attachment, error)

    async def _watch_anew(self, vtpm: UUID) -> None:
        """Have one watched whose sockets and connections ended with its keeper."""
        async with self._attachments.lock(vtpm):
            try:
                rows = self._rows(vtpm)
            except StorageError as error:
                self._catalogue_is_away(vtpm, error, self._watch_anew)
                return
            if rows is None or self._keepers.has(vtpm.bytes, rows[1].lease):
                return
            row, attachment = rows
            try:
                await self._sleepers.arm(row, attachment)
            except (ManagerError, OSError) as error:
                self._not_woken(row, attachment, error)

    async def find(self, row: VtpmRow, attachment: AttachmentRow) -> bool:
        """See to a vTPM without a process when manager or group open; returns whether it sleeps and is watched now."""
        async with self._attachments.lock(row.uuid):
            try:
                if not is_hibernated(self._registry.record(row.uuid).flags):
                    return False
                known = row.uuid in self._sleepers  # since its group was closed
                await (self._sleepers.watch_again if known else self._sleepers.arm)(row, attachment)
            except (ManagerError, StorageError, OSError) as error:
                _log.warning("vTPM %s is hibernated, and cannot be watched, so it is started: %s", row.uuid, error)
                return False
        return True
