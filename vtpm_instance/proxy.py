"""The front end `proxy`: the server's end of a /dev/tpmN of this host, made by the Linux vTPM proxy.

The descriptor is message-oriented: one read is one command, one write its answer, and the kernel has one under way at
a time. Its driver asks for a locality before every command by one of its own (0x20001000), which programs cannot send:
the kernel refuses it from them. Who is given up by the kernel reads a hang-up for ever.
Source: linux/drivers/char/tpm/tpm_vtpm_proxy.c; reference/virtual-machines.md E, reference/swtpm-libtpms-qemu.md 1.7.
"""

import errno
import os
import select
from collections.abc import Callable
from typing import Protocol

from frontend_backend.tpmhdr import HEADER_SIZE, MAX_COMMAND
from vtpm_instance import driver_locality
from vtpm_instance.framing import announced
from vtpm_instance.journal import note
from vtpm_instance.tpm_commands import CODE_END, CODE_OFFSET
from vtpm_instance.vtpm import Vtpm, failure_response, wrong_size_response


class Localities(Protocol):
    """What decides about localities."""

    def set_locality(self, locality: int) -> int:
        """Use `locality` from now on; returns 0, or why not."""


class ProxyServer(Protocol):
    """Whose vTPM the device is, and at which locality its commands run."""

    vtpm: Vtpm
    locality: int

    @property
    def platform(self) -> Localities:
        """What decides about its locality."""


class ProxySession:
    """What is said on the descriptor, sans-IO: a command in, its answer out."""

    def __init__(self, server: ProxyServer) -> None:
        """Serve `server`'s vTPM."""
        self._server = server
        self._family = server.vtpm.family

    def answer(self, command: bytes) -> bytes:
        """Return the answer to one whole message of the driver's."""
        if len(command) < HEADER_SIZE or announced(command)[0] != len(command):
            return wrong_size_response(self._family)
        if command[CODE_OFFSET:CODE_END] == driver_locality.PACKED:
            return driver_locality.answer(command, self._family, self._server.platform.set_locality)
        return self._server.vtpm.execute(command, self._server.locality)

    def failure(self) -> bytes:
        """Return what a command is answered that an instance took and did not answer."""
        return failure_response(self._family)


class ProxyPort:
    """The descriptor of one device, and the session on it."""

    def __init__(self, descriptor: int, server: ProxyServer, gone: Callable[[], None]) -> None:
        """Take `descriptor` over; `gone` is told once when the kernel has given the device up."""
        self._descriptor, self._gone = descriptor, gone
        self._session = ProxySession(server)
        # An instance that crashed may have taken a command. If none is waited for the kernel refuses this.
        self._write(self._session.failure())

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def on_event(self, events: int) -> None:
        """Answer the command that is there; `events` is what epoll says."""
        if not events & select.EPOLLIN:
            self._give_up()
            return
        try:
            command = os.read(self._descriptor, MAX_COMMAND)
        except OSError as error:
            if error.errno == errno.EPIPE:
                self._give_up()
            else:
                note(f"a command of the device cannot be read: {error}")
            return
        if command:
            self._write(self._session.answer(command))
        else:
            self._give_up()

    def _write(self, answer: bytes) -> None:
        try:
            os.write(self._descriptor, answer)
        except OSError as error:
            # EIO: the driver does not wait for this any more; EPIPE: the hang-up is the next event
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise

    def _give_up(self) -> None:
        note("the kernel has given the device up: it answers no program any more; detach and attach makes another")
        self._gone()

    def close(self) -> None:
        """Close our copy; manager and keeper have others."""
        os.close(self._descriptor)
