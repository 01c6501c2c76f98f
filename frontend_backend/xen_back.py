"""One vTPM device as its back end sees it: a state machine without I/O, over `xenbus_table`.

The adapter watches both ends' states, the manager and Xen; whenever one of them says something it reads all of `Seen`
anew, calls `step`, and carries the actions out in order before the next call. How often things changed in between does
not matter. Nor does a look that is torn by a change: the next look follows it. (A transaction would hold it together,
but a guest that writes all the time could keep one from ever ending.) Each step gives a handful of actions at most,
whatever a peer wrote.
"""

from dataclasses import dataclass, field, replace
from typing import Final

from frontend_backend.xenbus_table import BACK_TABLE, BackLink, BackSight, Move, XenbusState

FEATURE: Final = b"1"
"""What feature-protocol-v2 must say, of either end (mini-os wants exactly this; Linux any number but 0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What xenstore, the manager and Xen say about one device now.

    `back_state` None: our node is gone. `identity`: what the toolstack wrote (uuid, frontend path); if it changes this
    is another device. `bound`: the manager's grant stands. `domain_alive`: True where it cannot be known.
    """

    back_state: XenbusState | None
    online: bool
    front_state: XenbusState | None
    ring_ref: int | None
    event_channel: int | None
    feature: bytes | None  # the front end's feature-protocol-v2
    bound: bool
    domain_alive: bool = True
    identity: str = ""


@dataclass(frozen=True, slots=True)
class PublishFeatures:
    """Write feature-protocol-v2=1, feature-extra-pages=N and ready=1 to our node, unless it is gone."""


@dataclass(frozen=True, slots=True)
class SetState:
    """Write our `state`, unless the node is gone: in a transaction that reads it first (a write would make it anew)."""

    state: XenbusState


@dataclass(frozen=True, slots=True)
class Connect:
    """Map the page, bind the channel, start the bridge; then call `connected` or `connect_failed`. Always the last.

    After `connect_failed` step again at once: the front end may have changed its mind meanwhile.
    """

    ring_ref: int
    event_channel: int


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Give back what is in hand (IDLE, notify), unmap, unbind the channel."""


@dataclass(frozen=True, slots=True)
class RemoveNode:
    """Remove our own node (in a driver domain, where the toolstack waits for it)."""


@dataclass(frozen=True, slots=True)
class Bind:
    """Ask the manager, and ask again when its grant ends, until `Unbind`.

    When it grants, step again with `bound`, which stays while an ended grant is asked for anew; call `bind_refused`
    when it refuses.
    """


@dataclass(frozen=True, slots=True)
class Unbind:
    """End the grant, or the question for it."""


@dataclass(frozen=True, slots=True)
class Complain:
    """Tell the log (and the key `error`) what is wrong."""

    text: str


Action = PublishFeatures | SetState | Connect | Disconnect | RemoveNode | Bind | Unbind | Complain

_STATES: Final = {
    Move.TO_WAIT: XenbusState.INIT_WAIT,
    Move.TO_CLOSING: XenbusState.CLOSING,
    Move.TO_CLOSED: XenbusState.CLOSED,
}
_SIGHTS: Final = {
    None: BackSight.FRONT_GONE,
    XenbusState.UNKNOWN: BackSight.FRONT_ABSURD,
    XenbusState.INITIALISING: BackSight.FRONT_FRESH,
    XenbusState.INIT_WAIT: BackSight.FRONT_FRESH,
    XenbusState.CLOSING: BackSight.FRONT_CLOSING,
    XenbusState.CLOSED: BackSight.FRONT_CLOSED,
    XenbusState.RECONFIGURING: BackSight.FRONT_PAUSED,
    XenbusState.RECONFIGURED: BackSight.FRONT_PAUSED,
}
_CLOSING: Final = (XenbusState.CLOSING, XenbusState.CLOSED)
_OPEN: Final = (BackLink.WAITING, BackLink.CONNECTED)


@dataclass(slots=True)
class _Grant:
    """Where the question to the manager stands."""

    asked: bool = False  # and not refused since
    refused: bool = False  # the last answer, whatever has been asked since


@dataclass(slots=True)
class _Peer:
    """What is connected, or failed to be: (ring-ref, event-channel)."""

    connected: tuple[int, int] | None = None
    failed: tuple[int, int] | None = None
    was_at_4: bool = False  # since it was connected


@dataclass(slots=True)
class BackDevice:
    """The machine. `removes_own_node`: as a driver domain does; in dom0 the toolstack removes the nodes."""

    removes_own_node: bool = field(kw_only=True)
    link: BackLink = field(default=BackLink.NEW, init=False)
    _written: XenbusState | None = field(default=None, init=False)  # our state, as far as we know
    _identity: str = field(default="", init=False)
    _grant: _Grant = field(default_factory=_Grant, init=False)
    _peer: _Peer = field(default_factory=_Peer, init=False)
    _complaint: str = field(default="", init=False)

    def step(self, seen: Seen) -> list[Action]:
        """Return what is to be done now that the world is as `seen`."""
        self._take_note(seen)
        actions: list[Action] = []
        was = self.link
        self._walk(seen, actions)
        if self.link is BackLink.NEW and was is not BackLink.NEW:
            self._forget()
            self._walk(replace(seen, bound=False), actions)  # what was granted was another device's
        return actions + self._ask()

    def connected(self) -> list[Action]:
        """Take note that `Connect` succeeded."""
        assert self.link is BackLink.CONNECTED, self.link
        self._peer.failed = None
        self._complaint = ""
        self._written = XenbusState.CONNECTED
        return [SetState(XenbusState.CONNECTED)]

    def connect_failed(self, why: str) -> list[Action]:
        """Take note that `Connect` failed, and that nothing is left mapped or bound. Step again at once."""
        assert self.link is BackLink.CONNECTED, self.link
        self.link = BackLink.WAITING
        self._peer.failed, self._peer.connected = self._peer.connected, None
        return self._complain(why)

    def bind_refused(self, why: str) -> list[Action]:
        """Take note that the manager refused, which takes the device away; `bind_again` asks anew."""
        self._grant = _Grant(refused=True)
        if self.link in (BackLink.NEW, BackLink.ENDED):
            return []
        actions: list[Action] = [Disconnect()] if self.link is BackLink.CONNECTED else []
        self.link, self._peer = BackLink.SHUT, _Peer()
        return [*self._complain(why), *actions, *self._set(XenbusState.CLOSED)]

    def bind_again(self) -> list[Action]:
        """Ask the manager anew after it refused (the adapter decides when: an attachment may have come)."""
        if not self._grant.refused or self._grant.asked or self.link in (BackLink.NEW, BackLink.ENDED):
            return []
        self._grant.asked = True
        return [Bind()]

    def disconnected(self, why: str) -> list[Action]:
        """Take note that the adapter had to end a connection itself: nothing of it is left."""
        assert self.link is BackLink.CONNECTED, self.link
        self._peer.failed, self._peer.connected = self._peer.connected, None
        self.link = BackLink.SHUT
        return [*self._complain(why), *self._set(XenbusState.CLOSED)]

    def _forget(self) -> None:
        self._written, self._identity, self._complaint = None, "", ""
        self._grant, self._peer = _Grant(), _Peer()

    def _take_note(self, seen: Seen) -> None:
        if seen.bound:
            self._grant = _Grant(asked=True)
        if seen.front_state is XenbusState.CONNECTED and self._peer.connected:
            self._peer.was_at_4 = True
        if seen.front_state not in (XenbusState.INITIALISED, XenbusState.CONNECTED):
            self._peer.failed = None  # whatever comes next is another try

    def _walk(self, seen: Seen, actions: list[Action]) -> None:
        sight = self._look(seen)
        moves, link = BACK_TABLE[self.link, sight]
        if sight is BackSight.FRONT_HALF and link is BackLink.SHUT:
            actions += self._complain(
                "the front end names no page and channel, or not protocol 2 (feature-protocol-v2)"
            )
        if self._grant.refused and self.link is BackLink.SHUT and link in _OPEN:
            return  # the front end is not told that this device works
        if Move.CONNECT in moves and not seen.bound:
            # nothing is mapped before the manager agrees; a back end before us may have left 4, and then 4 stays
            left = self.link in (BackLink.NEW, BackLink.WAITING) and seen.back_state is XenbusState.CONNECTED
            moves = tuple(move for move in moves if move is not Move.CONNECT)
            moves, link = (moves if left else (*moves, Move.TO_WAIT)), BackLink.WAITING
        if self.link is BackLink.NEW:
            self._identity = seen.identity
        self._written = seen.back_state  # the toolstack writes there, too
        for move in moves:
            self._carry_out(move, seen, actions)
        self.link = link

    def _look(self, seen: Seen) -> BackSight:
        if seen.back_state is None:
            return BackSight.NODE_GONE
        if self.link is not BackLink.NEW and self._is_another(seen):
            return BackSight.REPLACED
        if not seen.domain_alive or not seen.online:
            return BackSight.ENDING  # whatever the states say: a write of ours may have replaced the toolstack's 5
        if seen.back_state in _CLOSING and seen.back_state is not self._written and self.link is not BackLink.NEW:
            return BackSight.TOLD_TO_CLOSE
        sight = _SIGHTS.get(seen.front_state)
        return sight or self._look_at_offer(seen)

    def _is_another(self, seen: Seen) -> bool:
        made_anew = seen.back_state is XenbusState.INITIALISING and self._written is not XenbusState.INITIALISING
        return made_anew or seen.identity != self._identity

    def _look_at_offer(self, seen: Seen) -> BackSight:
        """Look at a front end in state 3 or 4."""
        offer = _offer(seen)
        if offer is None:
            return BackSight.FRONT_HALF
        if offer == self._peer.failed:
            return BackSight.FRONT_SERVED
        if offer != self._peer.connected:
            return BackSight.FRONT_READY
        # the same numbers, but back from 4 to 3: it closed and published again
        anew = seen.front_state is XenbusState.INITIALISED and self._peer.was_at_4
        return BackSight.FRONT_READY if anew else BackSight.FRONT_SERVED

    def _carry_out(self, move: Move, seen: Seen, actions: list[Action]) -> None:
        match move:
            case Move.ANNOUNCE:
                actions.append(PublishFeatures())
            case Move.CONNECT:
                offer = _offer(seen)
                assert offer is not None, seen
                self._peer = _Peer(connected=offer, failed=self._peer.failed)
                actions.append(Connect(*offer))
            case Move.DISCONNECT:
                self._peer = _Peer()
                actions.append(Disconnect())
            case Move.UNBIND:
                if self._grant != _Grant():
                    actions.append(Unbind())
                self._grant = _Grant()
            case Move.REMOVE:
                if self.removes_own_node:
                    actions.append(RemoveNode())
            case _:
                actions += self._set(_STATES[move])

    def _set(self, state: XenbusState) -> list[Action]:
        if self._written is state:
            return []
        self._written = state
        return [SetState(state)]

    def _ask(self) -> list[Action]:
        """Ask the manager where nobody has."""
        if self._grant.asked or self._grant.refused or self.link in (BackLink.NEW, BackLink.ENDED):
            return []
        self._grant.asked = True
        return [Bind()]

    def _complain(self, text: str) -> list[Action]:
        if text == self._complaint:
            return []
        self._complaint = text
        return [Complain(text)]


def _offer(seen: Seen) -> tuple[int, int] | None:
    if seen.ring_ref is None or seen.event_channel is None or seen.feature != FEATURE:
        return None
    return seen.ring_ref, seen.event_channel
