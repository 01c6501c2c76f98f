"""The far side of a relay, beside the instances: takes near sides in, and asks instances what their clients ask."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from frontend_backend.descriptors import close_all
from manager.errors import ConfigurationError, ManagerError
from manager.relay_addresses import Address, Welcomer
from manager.relay_channels import Channel, Left, Session, SessionName
from manager.relay_cutting import failure, is_one
from manager.relay_errors import RelayDeniedError, RelayError, RelayProtocolError
from manager.relay_frames import Assembler, Frame, Hello, Kind, Opening, Welcome, frames_of
from manager.relay_frames import ChannelKind as Of
from manager.relay_ledger import Duty
from manager.relay_link import Link, first_frame, say
from manager.relay_succession import Notes
from manager.relay_vtpms import Vtpms
from manager.strangers import Strangers, source_of

_log = logging.getLogger("vtpm.relay")
MAX_LINKS: Final = 64  # near sides at once
MAX_SESSIONS: Final = 4  # of one client: one, and those whose relay was restarted and has not been missed yet
MAX_RUNNING: Final = 1024  # requests of one client, also of connections that it has closed
LINGER_SECONDS: Final = 300.0  # that a near side may be away before its guests' connections end
DRAIN_SECONDS: Final = 20.0  # that requests under way get when this relay is told to end
_LOOK_AGAIN: Final = 0.02


class Far:
    """Everything that the far side has."""

    def __init__(self, welcomer: Welcomer, vtpms: Vtpms, patience: float) -> None:
        """Serve clients that `welcomer` lets in; an instance that is away is waited for `patience` seconds."""
        self._welcomer, self._vtpms, self._patience = welcomer, vtpms, patience
        self.run_name = os.urandom(16)
        self._sessions: dict[SessionName, Session] = {}
        self._links = 0
        self._strangers = Strangers()
        self._leaving = False
        self._running: Counter[str] = Counter()  # requests by identity
        self._notes = Notes(None)
        self._nursery: trio.Nursery

    def take_over(self, path: Path) -> None:
        """Go on with what a predecessor left with its holder, or begin to leave things there. Raises OSError."""
        self._notes, self.run_name, left = Notes.begin(path, self.run_name)
        for each, descriptors in left:
            self._adopt(each, descriptors)
        self.reconsider()  # the clients' file may be another one
        if count := sum(len(session.channels) for session in self._sessions.values()):
            _log.info("took %d connections over from the relay before", count)

    def _adopt(self, left: Left, descriptors: list[int]) -> None:
        session = self._session(left.identity, left.session)
        try:
            session.take_over(left, descriptors)
        except RelayProtocolError as error:
            _log.warning("vTPM %s: a connection is not taken over: %s", left.opening.name, error)
            close_all(descriptors)
            self._notes.drop(session, left.number)

    # connections

    async def run(self, listeners: list[tuple[Address, trio.SocketListener]]) -> None:
        """Serve until `leave` is done."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._forget_those_gone)
            for address, listener in listeners:
                self._nursery.start_soon(self._accept, address, listener)

    async def _accept(self, address: Address, listener: trio.SocketListener) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                _log.error("%s: no connection can be taken: %s", address.text, error)
                await trio.sleep(1.0)
            else:
                if self._links >= MAX_LINKS or self._leaving:
                    await trio.aclose_forcefully(stream)
                else:
                    self._nursery.start_soon(self._serve, address, stream)

    async def _serve(self, address: Address, raw: trio.SocketStream) -> None:
        """Serve one near side as long as its connection lasts; whatever goes wrong with it is its affair."""
        try:
            with self._strangers.one_more(source_of(raw.socket)) as waiting:
                stream, client, identity = await self._welcomer.welcome(raw)
                link = Link(stream)
                hello = Hello.unpack((await first_frame(link, Kind.HELLO)).payload)
                session = self._sessions.get((identity, hello.session))
                resumed = session is not None and hello.known == self.run_name
                if session is not None and not resumed:
                    self._end(session)
                session = self._session(identity, hello.session)
                await link.write_now(Frame(Kind.WELCOME, payload=Welcome(self.run_name, resumed).pack()))
            if waiting.cancelled_caught:
                return
            if self._sessions.get(session.name) is not session:
                raise RelayDeniedError("it began anew meanwhile, or may not be here any more")
            _log.info("%s: client %s is here%s", address.text, client.name, " again" if resumed else "")
            self._links += 1
            try:
                await self._serve_link(session, link)
            finally:
                self._links -= 1
        except ConfigurationError as error:
            _log.error("%s: nobody can be let in: %s", address.text, error)
        except RelayDeniedError as error:
            _log.warning("%s: a connection was refused: %s", address.text, error)
        except (RelayError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError) as error:
            _log.info("%s: a connection ended: %s", address.text, str(error) or type(error).__name__)
        finally:
            await trio.aclose_forcefully(raw)

    def _session(self, identity: str, name: bytes) -> Session:
        session = self._sessions.get((identity, name))
        if session is None:
            own = [each for each in self._sessions.values() if each.name[0] == identity]
            if len(own) >= MAX_SESSIONS:
                gone = [each for each in own if each.link is None]
                if not gone:
                    raise RelayDeniedError("too many relays with this identity")
                self._end(min(gone, key=lambda each: each.left))
            session = Session((identity, name), self._vtpms.find, self._patience, left=trio.current_time())
            self._sessions[session.name] = session
        return session

    async def _serve_link(self, session: Session, link: Link) -> None:
        if session.link is not None:
            session.link.end()  # of a machine that has come back before its old connection was missed
        session.link, parts = link, Assembler()
        handlers: dict[Kind, Callable[[Frame], None]] = {
            Kind.OPEN: lambda frame: self._open(session, frame),
            Kind.CLOSE: lambda frame: self._close_one(session, frame, parts),
            Kind.REQUEST: lambda frame: self._request(session, frame, parts),
            Kind.NAMES: lambda _frame: self._nursery.start_soon(self._tell_names, session, link),
        }

        def on_frame(frame: Frame) -> None:
            if session.link is not link:
                return  # it is being ended: what still comes is nobody's
            handler = handlers.get(frame.kind)
            if handler is None:
                raise RelayProtocolError(f"{frame.kind.name} is nothing that a near side says")
            handler(frame)

        try:
            await link.run(on_frame)
        finally:
            if session.link is link:
                session.link, session.left = None, trio.current_time()

    async def _forget_those_gone(self) -> None:
        while True:
            await trio.sleep(LINGER_SECONDS / 10)
            for session in list(self._sessions.values()):
                if session.link is None and trio.current_time() - session.left > LINGER_SECONDS:
                    _log.warning("a near side has been away for %g s: its guests' connections end", LINGER_SECONDS)
                    self._end(session)

    def reconsider(self) -> None:
        """End what clients have that they may not have any more: the file that says so was read again."""
        for session in list(self._sessions.values()):
            client = self._welcomer.access.by_identity(session.name[0])
            if client is None:
                _log.warning("a client may not use this relay any more; its guests' connections end")
                self._end(session)
                continue
            for channel in list(session.channels.values()):
                if not client.may_reach(channel.opening.name):
                    self._turn_away(session, channel.number, channel.generation)
                    self._close(session, channel.number)

    def _turn_away(self, session: Session, number: int, generation: int) -> None:
        if session.link is not None:
            self._nursery.start_soon(say, session.link, Frame(Kind.CLOSE, number, generation))

    def _end(self, session: Session) -> None:
        if session.link is not None:
            session.link.end()
            session.link = None
        for number in list(session.channels):
            self._close(session, number)
        self._sessions.pop(session.name, None)

    # what a near side says

    def _open(self, session: Session, frame: Frame) -> None:
        opening = Opening.unpack(frame.payload)
        client = self._welcomer.access.by_identity(session.name[0])
        if client is None or not client.may_reach(opening.name):
            _log.warning("client %s may not reach vTPM %s", session.name[0], opening.name)
            self._turn_away(session, frame.channel, frame.sequence)
            return
        self._end_those_replaced(session, opening.name)
        known = session.channels.get(frame.channel)
        if known is not None and known.generation != frame.sequence:
            self._close(session, frame.channel)  # that its client had gone was said on a connection that broke
        session.open(frame.channel, frame.sequence, opening)

    def _end_those_replaced(self, session: Session, name: str) -> None:
        """End a client's connections to a vTPM of before its relay was restarted: QEMU ended with that one."""
        for other in self._sessions.values():
            if other is not session and other.name[0] == session.name[0] and other.link is None:
                for each in [each for each in other.channels.values() if each.opening.name == name]:
                    self._close(other, each.number)

    def _close_one(self, session: Session, frame: Frame, parts: Assembler) -> None:
        """Close what the near side says; the next client on the number may have been heard of before."""
        channel = session.channels.get(frame.channel)
        if channel is not None and frame.sequence in (0, channel.generation):
            self._close(session, frame.channel, parts)

    def _close(self, session: Session, number: int, parts: Assembler | None = None) -> None:
        if parts is not None:
            parts.forget(number)
        if session.close(number) is not None:
            self._notes.drop(session, number)

    def _request(self, session: Session, frame: Frame, parts: Assembler) -> None:
        channel = session.channels.get(frame.channel)
        if channel is None:
            return  # it was closed, or never allowed; its near side is told, or knows
        message = parts.add(frame)
        if message is None:
            return
        if not is_one(message, control=channel.opening.kind is Of.CONTROL):
            raise RelayProtocolError("a request that is none, or more than one")
        duty = channel.executed.take(frame.sequence)
        if duty is Duty.EXECUTE:
            if self._running[session.name[0]] >= MAX_RUNNING:
                raise RelayProtocolError("too many requests of one client")
            self._running[session.name[0]] += 1
            self._nursery.start_soon(self._execute, session, channel, frame.sequence, message)
        elif duty is Duty.ANSWER and channel.executed.answer is not None:
            self._nursery.start_soon(self._tell_again, session, channel, frame.sequence, channel.executed.answer)
        elif duty is Duty.FAIL:
            answer = failure(message, control=channel.opening.kind is Of.CONTROL)
            self._nursery.start_soon(self._reply, session, channel, frame.sequence, answer)

    async def _execute(self, session: Session, channel: Channel, sequence: int, request: bytes) -> None:
        async with channel.turn:
            channel.busy = True
            self._notes.leave(session, channel)
            answer = await channel.line.exchange(request)
            waited_for = channel.executed.done(sequence, answer)
            session.kept.trim()
            channel.busy = False
            self._running[session.name[0]] -= 1
            if session.channels.get(channel.number) is channel:
                self._notes.leave(session, channel)
            if waited_for:
                await self._reply(session, channel, sequence, answer)  # before the next one: so one a channel is kept

    async def _tell_again(self, session: Session, channel: Channel, sequence: int, answer: bytes) -> None:
        if session.link is None or channel.telling == (session.link, sequence):
            return
        channel.telling = session.link, sequence
        await self._reply(session, channel, sequence, answer)
        channel.telling = None

    @staticmethod
    async def _reply(session: Session, channel: Channel, sequence: int, answer: bytes) -> None:
        link = session.link
        if link is None or session.channels.get(channel.number) is not channel:
            return  # it is asked for again when there is a connection
        await say(link, *frames_of(Kind.REPLY, channel.number, sequence, answer))

    async def _tell_names(self, session: Session, link: Link) -> None:
        if link.telling_names:
            return
        link.telling_names = True
        try:
            names = await self._vtpms.names()
        except ManagerError as error:
            _log.warning("which vTPMs there are is not known just now: %s", error)
            return
        finally:
            link.telling_names = False
        client = self._welcomer.access.by_identity(session.name[0])
        found = [name for name in names if client is not None and client.may_reach(name)]
        await say(link, *frames_of(Kind.NAMES, 0, 0, "\n".join(found).encode()))

    async def leave(self) -> None:
        """Take no new requests, answer those under way, and end: a successor takes over what the holder has."""
        self._leaving = True
        for session in self._sessions.values():
            if session.link is not None:
                session.link.send_if_room(Frame(Kind.LEAVING))
        with trio.move_on_after(DRAIN_SECONDS):
            while not all(session.drained for session in self._sessions.values()):  # noqa: ASYNC110 - several counters, and seldom
                await trio.sleep(_LOOK_AGAIN)
        self._nursery.cancel_scope.cancel()
