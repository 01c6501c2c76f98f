"""Errors of the relay, each with its command's exit code."""

from frontend_backend.messages_admin import ExitCode
from manager.errors import ManagerError


class RelayError(ManagerError):
    """The relay cannot do what it is asked, or what its peer asks."""


class RelayProtocolError(RelayError):
    """The peer does not speak as it must; the stream ends, and a new one is made."""


class RelayDeniedError(RelayError):
    """The peer is not who it should be, or may not have what it asks for."""

    code = ExitCode.DENIED


class StreamCutError(RelayError):
    """A client's bytes are no requests; its connection ends."""
