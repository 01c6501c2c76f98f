"""What a guest reaches its vTPM by: listening sockets, or a device of this host. Made, found again, and taken away.

The sockets are the instance's and its keeper's alone. Of a device the manager has a copy of the server's descriptor,
too: so it stays when an instance crashes or its keeper dies, and the next instance goes on with it. It goes with the
last copy: at detach, or when neither manager nor keeper lives any more.
"""

import logging
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol
from uuid import UUID

import trio

from frontend_backend import messages_keeper as k
from frontend_backend.descriptors import close_all
from manager.errors import BusyError, KeeperError, ManagerError
from manager.keeper_client import Asks
from manager.proxy_device import ProxyDevice, give_to, given_up, new_device
from manager.sockets import Owner, SocketFolder, listen_on_ports, parse_mode
from storage.catalogue import AttachmentRow, VtpmRow

_log = logging.getLogger("vtpm.life")
PROXY: Final = "proxy"
# The kernel's driver asks some ten things before a device is there, milliseconds each; a self-test takes longest.
_REGISTERED_SECONDS: Final = 30.0
_LOOK_AGAIN: Final = 0.005


class Port(Protocol):
    """What a keeper is handed."""

    def fileno(self) -> int:
        """Return its descriptor."""

    def close(self) -> None:
        """Close this copy."""


class _Copy:
    """A copy of a descriptor that we keep."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = os.dup(descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)


class Ports:
    """The ports of every attached vTPM."""

    def __init__(self, sockets: Path, keeper: Asks) -> None:
        """Make them in folders below `sockets`; `keeper` knows those of running and sleeping ones."""
        self._sockets, self._keeper = sockets, keeper
        self._servers: dict[UUID, int] = {}  # descriptors of devices

    def _folder(self, attachment: AttachmentRow) -> SocketFolder:
        return SocketFolder(self._sockets, attachment.vtpm, attachment.frontend)

    def open(self, row: VtpmRow, attachment: AttachmentRow) -> Sequence[Port]:
        """Return what the next instance is handed, in the order of LISTENERS_OF; to be closed by the caller.

        Sockets are made anew. A device stays what it is, unless the kernel has given it up.

        Raises:
            ManagerError: it cannot be made; ProxyMissingError where the host has no vTPM proxy.

        """
        if attachment.frontend == PROXY:
            return [self._device_of(row, attachment)]
        if attachment.tcp_port:
            return listen_on_ports(attachment.tcp_port)
        uid, gid = map(int, attachment.owner.split(":"))
        listeners: list[socket.socket] = self._folder(attachment).listen(Owner(uid, gid), parse_mode(attachment.mode))
        return listeners

    def _device_of(self, row: VtpmRow, attachment: AttachmentRow) -> Port:
        known = self._servers.get(row.uuid)
        folder = self._folder(attachment)
        if known is not None and not given_up(known) and ProxyDevice.read(folder.endpoint) is not None:
            return _Copy(known)
        device, server = new_device(row.family)
        try:
            folder.make()
            device.write(folder.endpoint)
        except OSError as error:
            os.close(server)
            raise ManagerError(
                f"cannot write in {folder.path}: {error.strerror or error}; nothing was started"
            ) from error
        if known is not None:
            os.close(known)
        self._servers[row.uuid] = server
        return _Copy(server)

    async def ready(self, attachment: AttachmentRow) -> None:
        """Wait until guests can use what an instance that is ready serves.

        Raises:
            KeeperError, BusyError: the kernel does not get on with the TPM.

        """
        if attachment.frontend != PROXY:
            return
        device, server = self.device(attachment), self._servers.get(attachment.vtpm)
        if device is None or server is None:
            raise KeeperError("it is not known which device this vTPM has; detach and attach it")
        with trio.move_on_after(_REGISTERED_SECONDS):
            while not device.registered:  # the kernel tells nobody
                if given_up(server):
                    raise KeeperError(
                        f"the kernel does not get on with the TPM behind {device.path} and has given the device up; "
                        f"look at its log (dmesg)"
                    )
                await trio.sleep(_LOOK_AGAIN)
            uid, gid = map(int, attachment.owner.split(":"))
            give_to(device, uid, gid, parse_mode(attachment.mode))
            return
        raise BusyError(
            f"{device.path} did not appear within {_REGISTERED_SECONDS:g} s; look at the kernel's log (dmesg)"
        )

    def device(self, attachment: AttachmentRow) -> ProxyDevice | None:
        """Return the device of an attachment with the front end proxy, None where none was made."""
        return ProxyDevice.read(self._folder(attachment).endpoint)

    async def found(self, instances: Iterable[k.Kept]) -> None:
        """Take copies of the devices that these answer, from their keepers: this manager is new."""
        for kept in instances:
            try:
                server = await self._fetch(kept)
            except KeeperError as error:
                # It goes on with what its keeper has; only a crash of both would now cost the device.
                _log.warning("vTPM %s: no copy of its device's descriptor: %s", UUID(bytes=kept.vtpm), error)
            else:
                self._servers[UUID(bytes=kept.vtpm)] = server

    async def _fetch(self, kept: k.Kept) -> int:
        reply, received = await self._keeper.ask(k.Fetch(kept.vtpm, kept.lease))
        if not isinstance(reply, k.Fetched) or not received or reply.kept.listeners != (PROXY,):
            close_all(received)
            raise KeeperError(f"unexpected answer {type(reply).__name__} to Fetch")
        close_all(received[:-1])
        return received[-1]

    async def close(self, vtpm: UUID, frontend: str) -> None:
        """Take everything away; a device is gone on return, whoever has it open."""
        server = self._servers.pop(vtpm, None)
        if server is not None:
            # in a thread: the kernel waits for whoever is just using the device
            await trio.to_thread.run_sync(os.close, server)
        # in a thread: how much there is in it is its owner's choice
        await trio.to_thread.run_sync(SocketFolder(self._sockets, vtpm, frontend).remove)
