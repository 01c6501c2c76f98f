"""The near side's clients: QEMU, tpm2-tss and others on local sockets, each a channel of its own."""

import array
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import trio

from manager.errors import ConfigurationError
from manager.relay_cutting import SET_DATAFD, ControlCutter, DataCutter, number_of, succeeded
from manager.relay_endpoints import Assignments, Endpoint, Ports
from manager.relay_errors import RelayError, StreamCutError
from manager.relay_frames import ChannelKind
from manager.relay_near import Near, NearChannel
from manager.sockets import Owner

_log = logging.getLogger("vtpm.relay")
_READ: Final = 64 * 1024
_DESCRIPTORS: Final = 1  # that SET_DATAFD brings
_BAD_PARAMETER: Final = bytes((0, 0, 0, 3))  # TPM_BAD_PARAMETER: no descriptor, or none that can be used
_IO_ERROR: Final = bytes((0, 0, 0, 0x1F))  # TPM_IOERROR: there is a data connection already
_PAUSE: Final = 1.0  # seconds, out of descriptors
_ANCILLARY: Final = socket.CMSG_LEN(_DESCRIPTORS * array.array("i").itemsize)


class Clients:
    """Listens for every vTPM that has an endpoint, and serves who comes."""

    def __init__(
        self, near: Near, assignments: Assignments, folder: Path, ports: Ports | None, owner: Owner, mode: int
    ) -> None:
        """Make endpoints in `folder`; sockets belong to `owner` with permissions `mode`."""
        self._near, self._assignments, self._folder, self._ports = near, assignments, folder, ports
        self._owner, self._mode = owner, mode
        self._listening: set[str] = set()
        self._nursery: trio.Nursery | None = None

    async def run(self, ready: Callable[[], None]) -> None:
        """Listen for all that are known, before there is any far side, and for those that are added.

        Raises:
            ConfigurationError: the sockets cannot be made.

        """
        async with trio.open_nursery() as self._nursery:
            for name in self._assignments.places:
                self._listen(name)
            ready()
            await trio.sleep_forever()

    def add(self, names: Iterable[str]) -> None:
        """Give endpoints to vTPMs that have none yet; what goes wrong is logged, and tried again with the next list."""
        try:
            self._assignments.add(names)
        except ConfigurationError as error:
            _log.error("no endpoint for a new vTPM: %s", error)
        for name in self._assignments.places:
            try:
                if self._listen(name):
                    _log.info("vTPM %s is new: it is reached at %s", name, self.endpoint(name).control)
            except ConfigurationError as error:
                _log.error("no endpoint for vTPM %s: %s", name, error)

    def endpoint(self, name: str) -> Endpoint:
        """Return where a vTPM is reached."""
        return endpoint_of(self._assignments, self._folder, self._ports, name)

    def _listen(self, name: str) -> bool:
        if name in self._listening or self._nursery is None:
            return False
        endpoint = self.endpoint(name)
        try:
            made = endpoint.listen(self._owner, self._mode)
        except OSError as error:
            raise ConfigurationError(f"cannot listen for vTPM {name} in {endpoint.folder}: {error}") from error
        self._listening.add(name)
        for sock, control in made:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            self._nursery.start_soon(self._accept, name, listener, control)
        return True

    async def _accept(self, name: str, listener: trio.SocketListener, control: bool) -> None:
        assert self._nursery is not None
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    _log.error("vTPM %s: no client can be taken: %s", name, error)
                    await trio.sleep(_PAUSE)
                    continue
                serve = self._control if control else self._data
                self._nursery.start_soon(serve, name, stream.socket)

    async def _data(self, name: str, sock: trio.socket.SocketType) -> None:
        try:
            channel = self._near.open(name, ChannelKind.DATA)
        except RelayError as error:
            _log.error("vTPM %s: %s", name, error)
            sock.close()
            return
        await self._serve_data(channel, sock)

    async def _serve_data(self, channel: NearChannel, sock: trio.socket.SocketType) -> None:
        """Carry TPM commands until the client goes, or is not served."""
        cutter = DataCutter()
        try:
            with sock:
                while data := await sock.recv(_READ):
                    cutter.feed(data)
                    while (request := cutter.next()) is not None:
                        answer = await self._near.ask(channel, request)
                        if answer is None:
                            return
                        await _send_all(sock, answer)
        except (OSError, StreamCutError) as error:
            _log.debug("vTPM %s: a data connection ended: %s", channel.name, error)
        finally:
            self._near.close(channel)

    async def _control(self, name: str, sock: trio.socket.SocketType) -> None:
        """Carry control commands until the client goes; what it handed over ends with it."""
        try:
            channel = self._near.open(name, ChannelKind.CONTROL)
        except RelayError as error:
            _log.error("vTPM %s: %s", name, error)
            sock.close()
            return
        brought: list[int] = []
        try:
            with sock:
                async with trio.open_nursery() as passed:
                    await self._serve_control(channel, sock, brought, passed)
                    passed.cancel_scope.cancel()
        except* (OSError, StreamCutError) as group:
            _log.debug("vTPM %s: a control connection ended: %s", name, group.exceptions[0])
        finally:
            for descriptor in brought:
                os.close(descriptor)
            self._near.close(channel)

    async def _serve_control(
        self, channel: NearChannel, sock: trio.socket.SocketType, brought: list[int], passed: trio.Nursery
    ) -> None:
        cutter = ControlCutter()
        child: list[NearChannel] = []
        while True:
            request = cutter.next()
            if request is None:
                data = await _receive(sock, brought)
                if not data:
                    return
                cutter.feed(data)
                continue
            if number_of(request) == SET_DATAFD:
                answer = await self._take_descriptor(channel, request, brought, passed, child)
            else:
                answer = await self._near.ask(channel, request)
            if answer is None:
                return
            await _send_all(sock, answer)

    async def _take_descriptor(
        self,
        channel: NearChannel,
        request: bytes,
        brought: list[int],
        passed: trio.Nursery,
        child: list[NearChannel],
    ) -> bytes | None:
        """Serve a data connection that is handed over, if the far side's instance takes one, too."""
        if not brought:
            return _BAD_PARAMETER
        sock = _socket_of(brought.pop(0))
        if sock is None:
            return _BAD_PARAMETER
        if child:
            sock.close()
            return _IO_ERROR
        made = self._near.open(channel.name, ChannelKind.PASSED, channel)
        child.append(made)

        async def serve() -> None:
            await self._serve_data(made, trio.socket.from_stdlib_socket(sock))
            child.remove(made)

        answer: bytes | None = None
        try:
            channel.children.append(made)  # the far side hears of it before the command that gives it its connection
            answer = await self._near.ask(channel, request)
        finally:
            channel.children.remove(made)
            if answer is None or not succeeded(answer):
                child.remove(made)
                self._near.close(made)
                sock.close()
        if answer is not None and succeeded(answer):
            made.established = True
            passed.start_soon(serve)
        return answer


def endpoint_of(assignments: Assignments, folder: Path, ports: Ports | None, name: str) -> Endpoint:
    """Return where a vTPM is reached. Raises ConfigurationError: there is no such port."""
    return Endpoint(name, folder / name, None if ports is None else ports.of(assignments.places[name]))


def _socket_of(descriptor: int) -> socket.socket | None:
    """Return a stream socket that was handed over; anything else is closed."""
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    sock = socket.socket(fileno=descriptor)
    if sock.type != socket.SOCK_STREAM:
        sock.close()
        return None
    return sock


async def _receive(sock: trio.socket.SocketType, brought: list[int]) -> bytes:
    """Receive bytes, and descriptors that came with them."""
    if sock.family != socket.AF_UNIX:
        return await sock.recv(_READ)
    data, ancillary, _, _ = await sock.recvmsg(_READ, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found = array.array("i")
            found.frombytes(content[: len(content) - len(content) % found.itemsize])
            brought += found
    for extra in brought[_DESCRIPTORS:]:
        os.close(extra)
    del brought[_DESCRIPTORS:]
    return data


async def _send_all(sock: trio.socket.SocketType, data: bytes) -> None:
    sent = 0
    while sent < len(data):
        sent += await sock.send(data[sent:])
