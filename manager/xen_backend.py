"""Asks the manager which domain may have which vTPM, and keeps asking: the Binder of `vtpm-xen`.

One connection to RUNTIME/xen.sock for each device; it stands as long as the binding (messages_xen). A manager that is
away is waited for: the guest's device stays in InitWait, or connected as it is, and the log says so once.
"""

import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import trio

from frontend_backend.channel_trio import receive_message_trio, send_message_trio
from frontend_backend.descriptors import close_all
from frontend_backend.errors import RingError
from frontend_backend.local import LocalRing
from frontend_backend.messages_xen import (
    DESCRIPTORS as JOINED_DESCRIPTORS,
)
from frontend_backend.messages_xen import (
    XEN_DATAGRAM,
    Bind,
    Bound,
    Join,
    Joined,
    XenCode,
    XenRefusal,
    XenReply,
    XenRequest,
    decode_xen,
    encode_xen,
)
from frontend_backend.tpmhdr import TpmFamily
from frontend_backend.xen_terms import BindRefusedError, Granted, Place, Terms
from manager.xen_backend_bindings import FIRST_PAUSE, LAST_PAUSE, BoundVtpm, JoinedInstance, connect, reason
from manager.xen_backend_identity import Identity
from manager.xen_backend_others import Others

_log = logging.getLogger("vtpm.xen")

ANSWER_SECONDS: Final = 60.0
"""Seconds for the manager's answer to a Bind: it may start an instance and commit before it gives one."""
REFUSED_PAUSE: Final = 60.0
"""Seconds after which a domain that may not have the vTPM is asked for again: somebody may have attached it since."""


@dataclass(frozen=True, slots=True)
class Testimony:
    """What Xen itself says about a domain; see manager.xen_backend_witness."""

    label: str = ""
    ran_before: bool | None = None
    resumed: bool = False


class Witness(Protocol):
    """Who knows what Xen says about a domain."""

    def meet(self, place: Place) -> None:
        """Look at a domain while the toolstack holds it, once."""
        ...

    def testify(self, place: Place, identity: Identity) -> Testimony:
        """Say what is known about a domain that asks for its vTPM."""
        ...

    def bound(self, place: Place) -> None:
        """Note that it has it: what was kept for it is used up."""
        ...

    def part(self, place: Place) -> None:
        """Note how it ended: its device goes."""
        ...


class ManagerBinder:
    """The manager as a Binder."""

    def __init__(
        self, path: Path, identify: Callable[[int], Awaitable[Identity]], witness: Witness, others: Others
    ) -> None:
        """Ask at the socket `path`; `identify` says who a domain is, `others` who else may be meant."""
        self._path, self._identify, self._witness, self._others = path, identify, witness, others
        self._joins: set[tuple[int, int]] = set()  # devices that turned out to be an instance domain's

    async def meet(self, place: Place) -> None:
        """See Binder."""
        self._witness.meet(place)

    def part(self, place: Place) -> None:
        """See Binder."""
        self._joins.discard((place.domain, place.device))
        self._others.part(place)
        self._witness.part(place)

    async def bind(self, place: Place, uuid: bytes) -> Granted:
        """See Binder."""
        pause, said = FIRST_PAUSE, ""
        while True:
            identity = await self._identify(place.domain)
            problem = ""
            try:
                return await self._ask(place, uuid, identity)
            except _RefusedError as refusal:
                if refusal.code in (XenCode.DENIED, XenCode.WRONG_FRONTEND):
                    raise BindRefusedError(str(refusal), REFUSED_PAUSE) from refusal
                problem = str(refusal)
            except (OSError, RingError, trio.TooSlowError) as error:
                problem = f"the manager is away ({reason(error)}): asked again until it is back"
            if problem != said:
                _log.warning("%s: %s", place, problem)
                said = problem
            await trio.sleep(pause)
            pause = min(pause * 2, LAST_PAUSE)

    async def _ask(self, place: Place, uuid: bytes, identity: Identity) -> Granted:
        key = (place.domain, place.device)
        first, second = (self._join, self._bind) if key in self._joins else (self._bind, self._join)
        try:
            granted = await first(place, uuid, identity)
        except _RefusedError as refusal:
            if refusal.code is not XenCode.WRONG_FRONTEND:
                raise
            try:
                granted = await second(place, uuid, identity)
            except _RefusedError as other:
                raise (refusal if other.code is XenCode.WRONG_FRONTEND else other) from other
        (self._joins.add if granted.terms.wishes else self._joins.discard)(key)
        return granted

    async def _bind(self, place: Place, uuid: bytes, identity: Identity) -> Granted:
        seen = self._witness.testify(place, identity)
        question = Bind(
            uuid, place.domain, place.device, identity.name, identity.uuid, seen.label, seen.ran_before, seen.resumed,
            identity.kernel, identity.cmdline, identity.initrd, await self._others.of(place, uuid),
        )  # fmt: skip
        sock, reply, _ = await self._talk(question, 0)
        if not isinstance(reply, Bound) or not reply.endpoint:
            sock.close()
            raise _RefusedError(XenCode.WRONG_FRONTEND, "its vTPM runs in another domain, which is to be its back end")
        self._witness.bound(place)
        _log.info("%s: %s has its vTPM%s", place, identity.name or "the domain", ", resumed" if seen.resumed else "")
        family = TpmFamily(reply.family)
        return BoundVtpm(sock, reply.endpoint, Terms(family, reply.compat, reply.localities, reply.extra_pages))

    async def _join(self, place: Place, uuid: bytes, identity: Identity) -> Granted:
        label = self._witness.testify(place, identity).label
        others = await self._others.of(place, uuid)
        question = Join(uuid, place.domain, place.device, identity.name, identity.uuid, label, others)
        sock, reply, descriptors = await self._talk(question, JOINED_DESCRIPTORS)
        if not isinstance(reply, Joined) or not descriptors:
            close_all(descriptors)
            sock.close()
            raise _RefusedError(XenCode.FAILED, "the manager answered something else than was asked")
        try:
            ring = LocalRing.adopt(*descriptors)
        except RingError:
            sock.close()
            raise
        _log.info("%s: the instance in %s has joined", place, identity.name or "the domain")
        return JoinedInstance(sock, ring)

    async def _talk(self, question: XenRequest, descriptors: int) -> tuple[socket.socket, XenReply, list[int]]:
        sock = await connect(self._path)
        try:
            with trio.fail_after(ANSWER_SECONDS):
                await send_message_trio(sock, encode_xen(question))
                data, received = await receive_message_trio(sock, XEN_DATAGRAM, descriptors)
            reply = decode_xen(data)
        except BaseException:
            sock.close()
            raise
        if isinstance(reply, XenRefusal):
            close_all(received)
            sock.close()
            raise _RefusedError(reply.code, reply.text)
        if isinstance(reply, Bind | Join):
            close_all(received)
            sock.close()
            raise _RefusedError(XenCode.FAILED, "the manager answered with a question")
        return sock, reply, received


class _RefusedError(Exception):
    """The manager's refusal."""

    def __init__(self, code: XenCode, text: str) -> None:
        super().__init__(text)
        self.code = code
