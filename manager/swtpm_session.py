"""The relay of one command line in swtpm's place, with the sockets and files that are there for it."""

import socket
from typing import Final

from frontend_backend.swtpm_options import SwtpmOptions
from manager import swtpm_control, swtpm_endpoints, swtpm_process
from manager.errors import ManagerError
from manager.swtpm_relay import Channel, Endings, Relay
from manager.swtpm_use import Use

_NAMES: Final = {Channel.CONTROL: swtpm_control.CONTROL, Channel.DATA: swtpm_control.DATA}


class Session:
    """The relay of one command line, and what is there for it."""

    def __init__(self, options: SwtpmOptions, use: Use, wakeup: socket.socket) -> None:
        """Open what the command line says. Raises ManagerError."""
        ends = Endings(
            with_control=options.control is not None and options.control.terminate, with_platform=options.terminate
        )
        self._options, self._use = options, use
        self._relay = Relay(self._connect, ends, wakeup)
        try:
            self._open()
        except (ManagerError, OSError):
            self.close()
            raise

    def _open(self) -> None:
        for channel, endpoint in ((Channel.CONTROL, self._options.control), (Channel.DATA, self._options.server)):
            if endpoint is None:
                continue
            client = swtpm_endpoints.connected(endpoint)
            if client is None:
                self._relay.listen(channel, swtpm_endpoints.listener(endpoint))
            else:
                self._serve(channel, client)

    def _serve(self, channel: Channel, client: socket.socket) -> None:
        """Serve a client that the command line brought along. Raises ManagerError: the vTPM does not take it."""
        try:
            self._relay.serve(channel, client)
        except OSError as error:
            client.close()
            if isinstance(error.__cause__, ManagerError):
                raise error.__cause__ from None
            raise ManagerError(f"the {channel.value} connection cannot be served: {error}") from error

    def _connect(self, channel: Channel) -> socket.socket:
        self._use.switched = True  # from now on somebody may say INIT
        try:
            return swtpm_control.connect(self._use.folder, _NAMES[channel])
        except ManagerError as error:
            raise OSError(str(error)) from error  # one client's, and not the relay's end

    def run(self) -> None:
        """Relay to the end."""
        self._relay.run()

    def close(self) -> None:
        """Close and remove everything."""
        self._relay.close()
        for endpoint in (self._options.control, self._options.server):
            swtpm_endpoints.remove(endpoint)
        swtpm_process.remove_pid(self._options.pid)
