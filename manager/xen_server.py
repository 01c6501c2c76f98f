"""The socket of vtpm-xen: which domain may have which vTPM. One device a connection, which stays open while it lasts.

The rules are `xen_binding`'s. What lives here: who asks, what is done before the answer, and when a binding ends.
"""

import logging
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import trio

from frontend_backend.channel_trio import receive_message_trio, send_message_trio
from frontend_backend.descriptors import PeerCredentials
from frontend_backend.errors import ChannelClosedError, RingError
from frontend_backend.local import LocalRing
from frontend_backend.messages_xen import (
    XEN_DATAGRAM,
    Bind,
    Bound,
    Join,
    Joined,
    XenCode,
    XenRefusal,
    XenReply,
    decode_xen,
    encode_xen,
)
from manager.accepting import accept_clients
from manager.attachments import Attachments
from manager.errors import ManagerError
from manager.measure_option import TOOLSTACK, of_toolstack
from manager.registry import Registry
from manager.running import Running, Stage
from manager.sockets import Owner, SocketFolder, listen_on_path
from manager.tombstones import iso
from manager.xen_attach import XEN
from manager.xen_binding import Bound as Binding
from manager.xen_binding import (
    Coming,
    Refused,
    admission,
    bound_row,
    domain_of,
    nobodys,
    shown,
    vtpm_of,
)
from manager.xen_events import XenEvents
from manager.xen_remote import Elsewhere
from storage.catalogue_rows import AttachmentRow, VtpmRow
from storage.errors import StorageError
from storage.store_records import RecordFlags

_log = logging.getLogger("vtpm.xen")
EXTRA_PAGES: Final = 1  # libtpms takes commands of 4096 bytes: with the head that is more than one page
_MOST_CONNECTIONS: Final = 2048  # each costs a descriptor; 64 times what a host of Xen runs as a rule
_REQUEST_SECONDS: Final = 10.0
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(eq=False, slots=True)
class _Held:
    """A binding, its connection, and the instance where that lives elsewhere."""

    vtpm: UUID
    name: str
    binding: Binding
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    over: trio.Event = field(default_factory=trio.Event)
    joined: Running | None = None


class XenServer:
    """Answers vtpm-xen."""

    def __init__(
        self, registry: Registry, attachments: Attachments, elsewhere: Elsewhere, events: XenEvents, sockets: Path
    ) -> None:
        """Serve `attachments`; the sockets of running ones lie in `sockets`."""
        self._registry, self._attachments, self._elsewhere = registry, attachments, elsewhere
        self._events, self._sockets = events, sockets
        self._held: dict[UUID, _Held] = {}
        self._room = trio.Semaphore(_MOST_CONNECTIONS)
        self._boot = _BOOT_ID.read_text(encoding="ascii").strip()
        attachments.on_detached = self.release

    def release(self, vtpm: UUID) -> None:
        """End the binding of a vTPM, if there is one: it was detached."""
        held = self._held.get(vtpm)
        if held is not None:
            held.scope.cancel()

    async def run(self, listener: socket.socket) -> None:
        """Accept until cancelled."""
        await accept_clients(listener, self._serve, "vtpm-xen", self._room)

    async def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                await self._one_device(client)
        except (OSError, ChannelClosedError, trio.TooSlowError) as error:
            _log.debug("vtpm-xen went away, or does not read: %r", error)
        finally:
            self._room.release()

    async def _one_device(self, client: socket.socket) -> None:
        peer = PeerCredentials.of(client)
        if peer.uid not in (0, os.geteuid()):
            _log.warning("user %d may not ask for vTPMs of domains: only root and the manager's user may", peer.uid)
            return
        try:
            with trio.fail_after(_REQUEST_SECONDS):
                request = decode_xen((await receive_message_trio(client, XEN_DATAGRAM))[0])
        except trio.TooSlowError:
            return
        except RingError as error:
            await _send(client, XenRefusal(XenCode.FAILED, f"malformed request: {error}"))
            return
        if not isinstance(request, Bind | Join):
            await _send(client, XenRefusal(XenCode.FAILED, "an answer where a request is due"))
            return
        await self._asked(client, request)

    async def _asked(self, client: socket.socket, request: Bind | Join) -> None:
        vtpm, row = vtpm_of(request), None
        try:
            row = None if vtpm is None else self._registry.catalogue.find_vtpm(vtpm)
            if row is None:
                granted: tuple[XenReply, _Held, LocalRing | None] | Refused = Refused(
                    XenCode.UNKNOWN,
                    f"this manager has no vTPM {vtpm or request.uuid.hex()[:64]}; 'vtpm-list' shows what there is",
                )
            else:
                granted = await self._decide(row, request)
        except (ManagerError, StorageError, OSError) as error:
            granted = Refused(XenCode.FAILED, str(error))
        except Exception as error:  # noqa: BLE001 - our own mistake in one binding must not end every vTPM's manager
            _log.exception("a binding failed in a way nobody foresaw")
            granted = Refused(XenCode.FAILED, f"the manager made a mistake ({type(error).__name__}); see its log")
        if isinstance(granted, Refused):
            self._events.refused(row, request, granted)
            await _send(client, XenRefusal(*granted))
            return
        await self._hold(client, *granted)

    async def _hold(self, client: socket.socket, reply: XenReply, held: _Held, end: LocalRing | None) -> None:
        """Answer, and wait for the end of a binding."""
        try:
            with held.scope:
                try:
                    await _send(client, reply, () if end is None else end.descriptors())
                finally:
                    if end is not None:
                        end.close()
                async with trio.open_nursery() as nursery:
                    if held.joined is not None:
                        nursery.start_soon(_then_cancel, held.joined.ended, held.scope)
                    with suppress(ChannelClosedError, RingError, OSError):
                        await receive_message_trio(client, XEN_DATAGRAM)  # nothing more is due: the end of it
                    nursery.cancel_scope.cancel()
        finally:
            await self._ended(held)

    async def _ended(self, held: _Held) -> None:
        if self._held.get(held.vtpm) is held:
            del self._held[held.vtpm]
            self._attachments.bindings.bound.pop(held.vtpm, None)
        held.over.set()
        self._events.unbound(held.vtpm, held.name, held.binding)
        if held.joined is not None:  # not where the manager ends: then nobody would tell that it is done
            await self._elsewhere.left(held.joined)

    async def _decide(self, row: VtpmRow, request: Bind | Join) -> tuple[XenReply, _Held, LocalRing | None] | Refused:
        """Say who gets it, having made it ready. Raises ManagerError, StorageError, OSError: it cannot be had now."""
        async with self._attachments.lock(row.uuid):
            attachment = self._registry.catalogue.find_attachment(row.uuid)
            if attachment is None:
                return Refused(
                    XenCode.UNKNOWN,
                    f"vTPM {row.name} is attached to nobody: 'vtpm-attach {row.name} GUEST --frontend {XEN}' attaches "
                    f"it",
                )
            domain = domain_of(request, self._boot)
            before = self._held.get(row.uuid)
            now = None if before is None else before.binding
            coming = admission(row.name, attachment, request, domain, now)
            if isinstance(coming, Refused):
                return coming
            running = self._attachments.running(row.uuid)
            if running is not None and running.lease != attachment.lease and isinstance(request, Bind):
                coming = Coming.POWER_CYCLE  # the row was put back: it says who had another life of this TPM
            if self._registry.record(row.uuid).flags & RecordFlags.QUARANTINED:
                return Refused(
                    XenCode.FAILED,
                    f"vTPM {row.name} is quarantined: its state could not be loaded. 'vtpm-reset-platform {row.name}' "
                    f"tries again",
                )
            if before is not None:
                before.scope.cancel()
                await before.over.wait()
            changes = bound_row(request, domain, coming, iso(time.time()))
            held = _Held(row.uuid, row.name, Binding(domain, request.device, shown(request.name), time.time()))
            if isinstance(request, Bind):
                reply: XenReply = await self._bind(row, attachment, request, coming, changes)
                end = None
            else:
                back = coming is Coming.BACK
                held.joined, end = await self._elsewhere.join(row, attachment, changes, back=back)
                reply = Joined()
            self._held[row.uuid], self._attachments.bindings.bound[row.uuid] = held, held.binding
        self._events.bound(row, request, coming)
        return reply, held, end

    async def _bind(
        self, row: VtpmRow, attachment: AttachmentRow, request: Bind, coming: Coming, changes: dict[str, Any]
    ) -> Bound:
        """Have the instance as its guest is to find it, then say in the row whose it is.

        In this order: whoever dies in between leaves a row that says that the guest before had it, or, once its TPM
        is reset, that nobody had, and the platform is reset once more.
        """
        running = await self._attachments.awake(row)
        if coming in (Coming.FIRST, Coming.POWER_CYCLE):
            await self._measure(row, attachment, request)
        # by what its guest's boot is measured by now: not so with --measure toolstack, or after vtpm-measure
        fits = running is not None and running.stage is Stage.RUNNING and running.measured == attachment.measure
        unused = fits and running is not None and running.unused
        if coming is Coming.POWER_CYCLE or (coming is Coming.FIRST and not unused):
            running = await self._attachments.power_cycle(row, nobodys(attachment))
        if running is None:
            why = self._attachments.reason(row.uuid) or "look at the manager's log"
            raise ManagerError(f"vTPM {row.name} is down: {why}")
        newest = self._registry.catalogue.find_attachment(row.uuid)
        if coming is not Coming.BACK and newest is not None:
            self._registry.catalogue.renew(replace(newest, **changes))
        running.unused = False
        return Bound(
            endpoint=str(SocketFolder(self._sockets, row.uuid, XEN).endpoint),
            family=row.family,
            compat=attachment.compat,
            localities=attachment.localities,
            extra_pages=EXTRA_PAGES,
        )

    async def _measure(self, row: VtpmRow, attachment: AttachmentRow, request: Bind) -> None:
        if attachment.measure == TOOLSTACK:
            read = partial(of_toolstack, request.kernel, request.cmdline, request.initrd)
            self._attachments.boots.by_toolstack(row.uuid, await trio.to_thread.run_sync(read))


def listen(path: Path) -> socket.socket:
    """Listen for vtpm-xen: root, and the manager's own user. Raises OSError."""
    listener = listen_on_path(path, Owner.ourselves(), 0o600, socket.SOCK_SEQPACKET, _MOST_CONNECTIONS)
    listener.setblocking(False)
    return listener


async def _send(client: socket.socket, reply: XenReply, descriptors: tuple[int, ...] = ()) -> None:
    with trio.fail_after(_REQUEST_SECONDS):
        await send_message_trio(client, encode_xen(reply), descriptors)


async def _then_cancel(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
