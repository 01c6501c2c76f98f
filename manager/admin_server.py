"""The admin socket: who asks, may they, do it, answer. One request a connection."""

import grp
import logging
import os
import socket
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Final

import trio

from frontend_backend.channel_trio import receive_message_trio, send_message_trio
from frontend_backend.descriptors import PeerCredentials, close_all
from frontend_backend.errors import ChannelClosedError, RingError
from frontend_backend.messages_admin import (
    ROWS_AT_ONCE,
    AdminReply,
    AdminRequest,
    Done,
    ExitCode,
    Failure,
    Note,
    Row,
    Rows,
    decode_admin,
    encode_admin,
)
from manager.accepting import accept_clients
from manager.config import AdminConfig
from manager.errors import ConfigurationError, DeniedError, ManagerError, UsageError
from manager.services import Answer, Caller, Document, Services
from manager.sockets import parse_mode
from manager.verb_form import LISTS, Argument
from manager.verb_table import BY_NAME, Role, Verb
from manager.verbs import HANDLERS
from storage.errors import NameTaken, NoSuchRow, StorageError

_log = logging.getLogger("vtpm.admin")
_REQUEST_SECONDS: Final = 10.0  # a client that says nothing for longer is dropped
_REPLY_SECONDS: Final = 30.0  # and one that does not read
_MAX_CLIENTS: Final = 64
_MAX_DESCRIPTORS: Final = 4
_KINDS: Final[Mapping[str, type]] = {
    **dict.fromkeys(("str", "path", "text", "bytes"), str),
    "int": int,
    "flag": bool,
    **dict.fromkeys(LISTS, tuple),
}


class _ReaderGoneError(Exception):
    """Whoever asked does not read the answer; nothing more can be said to him."""


def role_of(peer: PeerCredentials, config: AdminConfig) -> Role | None:
    """Return what a peer may do: root and the manager's own user administer, others by configuration."""
    if peer.uid in (0, os.geteuid()):
        return Role.ADMINISTRATOR
    if peer.uid in config.operator_uids:
        return Role.OPERATOR
    if peer.uid in config.auditor_uids:
        return Role.AUDITOR
    return None


def check_arguments(verb: Verb, untrusted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the verb's arguments, all of them, defaults filled in.

    Raises:
        UsageError: one is unknown, missing, of the wrong type, or none of its choices.

    """
    known = {argument.name: argument for argument in verb.arguments if not argument.local}
    unknown = set(untrusted) - set(known)
    if unknown:
        raise UsageError(
            f"{verb.name} has no argument '{min(unknown)[:40]}': this manager may be older than this command"
        )
    checked: dict[str, Any] = {}
    for name, argument in known.items():
        value = untrusted.get(name)
        if value is None:
            if argument.required:
                raise UsageError(f"{verb.name} needs {name.upper()}")
            value = () if argument.kind in LISTS else argument.default
        elif type(value) is not _KINDS[argument.kind]:
            raise UsageError(f"{verb.name}: {name} is not a {argument.kind}")
        elif argument.choices and value not in argument.choices:
            raise UsageError(f"{verb.name}: {name} is one of {', '.join(argument.choices)}")
        elif value == "" and not argument.positional:
            raise UsageError(_nothing_in(argument))
        checked[name] = value
    return checked


def _nothing_in(argument: Argument) -> str:
    """Say that nothing was given where something was meant, as by a variable that is not set or a file cut short."""
    of_file = argument.kind in ("text", "bytes")
    what = f"the file that {argument.option} names is empty" if of_file else f"{argument.option} is given, but empty"
    return f"{what}: that is not the default, which is there without the option. Nothing was done"


def access_of(config: AdminConfig) -> tuple[int, int]:
    """Return the admin socket's permissions and group; -1 for the manager's own. Raises ConfigurationError."""
    try:
        mode = parse_mode(config.socket_mode)
    except UsageError as error:
        raise ConfigurationError(f"[admin] socket_mode cannot be used: {error}") from error
    try:
        return mode, grp.getgrnam(config.socket_group).gr_gid if config.socket_group else -1
    except KeyError as error:
        raise ConfigurationError(
            f"[admin] socket_group cannot be used: there is no group '{config.socket_group[:80]}'"
        ) from error


def listen(path: Path, config: AdminConfig) -> socket.socket:
    """Make the admin socket with its owner and mode before anybody can connect.

    Raises:
        ConfigurationError: the mode or group of the configuration cannot be used.

    """
    mode, gid = access_of(config)
    with suppress(FileNotFoundError):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    previous = os.umask(0o177)
    try:
        sock.bind(str(path))
        os.chown(path, -1, gid)
        path.chmod(mode)
        sock.listen(_MAX_CLIENTS)
    except OSError as error:
        sock.close()
        raise ConfigurationError(f"cannot make the admin socket {path}: {error.strerror or error}") from error
    finally:
        os.umask(previous)
    sock.setblocking(False)
    return sock


class AdminServer:
    """Answers administrators."""

    def __init__(self, services: Services, config: AdminConfig) -> None:
        """Serve `services`' verbs to those whom `config` gives a role."""
        self._services, self._config = services, config
        self._room = trio.Semaphore(_MAX_CLIENTS)

    async def run(self, listener: socket.socket) -> None:
        """Accept until cancelled, or until trio is told that `listener` closes; those accepted are served on."""
        await accept_clients(listener, self._serve, "an administrator", self._room)

    async def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                await self._one_request(client)
        except (OSError, ChannelClosedError) as error:
            _log.debug("administrator went away: %s", error)
        finally:
            self._room.release()

    async def _one_request(self, client: socket.socket) -> None:
        descriptors: list[int] = []
        replies: list[AdminReply]
        try:
            with trio.fail_after(_REQUEST_SECONDS):
                data, descriptors = await receive_message_trio(client, max_descriptors=_MAX_DESCRIPTORS)
            answer = self._do(PeerCredentials.of(client), data, tuple(descriptors))
            if isinstance(answer, AsyncGenerator):
                await self._stream(client, answer)
                replies = [Done()]
            else:
                replies = [*map(Row, await answer), Done()]
        except _ReaderGoneError:
            return
        except trio.TooSlowError:
            replies = [Failure(ExitCode.BUSY, f"no request came within {_REQUEST_SECONDS:g} s")]
        except ChannelClosedError:
            return
        except ManagerError as error:
            replies = [Failure(error.code, str(error))]
        except RingError as error:
            replies = [Failure(ExitCode.USAGE, f"malformed request: {error}")]
        except (NoSuchRow, NameTaken) as error:  # looked at before, by two requests at once
            code = ExitCode.NOT_FOUND if isinstance(error, NoSuchRow) else ExitCode.CONFLICT
            replies = [
                Failure(code, f"{error}: somebody else asked at the same time; 'vtpm-list' shows what there is now")
            ]
        except (StorageError, OSError) as error:
            _log.exception("a request failed")
            replies = [Failure(ExitCode.FAILURE, str(error))]
        except Exception as error:  # noqa: BLE001 - our own mistake in one verb must not end every vTPM's manager
            _log.exception("a verb failed in a way nobody foresaw")
            replies = [Failure(ExitCode.FAILURE, f"the manager made a mistake ({type(error).__name__}); see its log")]
        finally:
            close_all(descriptors)
        with suppress(_ReaderGoneError):
            await self._send(client, replies)

    async def _stream(self, client: socket.socket, answer: AsyncGenerator[Document | Note]) -> None:
        """Send a long answer as it comes, several documents a datagram."""
        waiting: list[Document] = []
        async with aclosing(answer):
            async for item in answer:
                if not isinstance(item, Note):
                    waiting.append(item)
                if waiting and (isinstance(item, Note) or len(waiting) == ROWS_AT_ONCE):
                    await self._send(client, [Rows(tuple(waiting))])
                    waiting.clear()
                if isinstance(item, Note):
                    await self._send(client, [item])
        if waiting:
            await self._send(client, [Rows(tuple(waiting))])

    @staticmethod
    async def _send(client: socket.socket, replies: list[AdminReply]) -> None:
        """Send replies; one that does not read must not keep a place. Raises _ReaderGoneError."""
        with trio.move_on_after(_REPLY_SECONDS) as reading:
            try:
                for reply in replies:
                    await send_message_trio(client, encode_admin(reply))
            except OSError as error:
                _log.debug("an administrator went away: %s", error)
                raise _ReaderGoneError from error
        if reading.cancelled_caught:
            _log.warning("an administrator did not read the answer within %g s", _REPLY_SECONDS)
            raise _ReaderGoneError

    def _do(self, peer: PeerCredentials, data: bytes, descriptors: tuple[int, ...]) -> Answer:
        request = decode_admin(data)
        if not isinstance(request, AdminRequest):
            raise UsageError("an answer where a request is due")
        verb = BY_NAME.get(request.verb)
        if verb is None:
            raise UsageError(f"this manager has no verb '{request.verb[:40]}': it may be older than this command")
        role = role_of(peer, self._config)
        if role is None or role < verb.role:
            raise DeniedError(
                f"user {peer.uid} may not use '{verb.name}': it needs the role {verb.role.name.lower()} "
                f"([admin] in the configuration gives roles)"
            )
        arguments = check_arguments(verb, request.arguments)
        what = str(arguments.get("vtpm") or arguments.get("group") or arguments.get("name") or "")
        _log.info("%s %.80r by user %d", verb.name, what, peer.uid)  # repr: no line of the log is the caller's
        return HANDLERS[verb.name](self._services, Caller(peer.uid, descriptors), arguments)
