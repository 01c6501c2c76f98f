"""One vTPM device as its front end sees it: a state machine without I/O, over `xenbus_table`.

The adapter watches its own device's directory and the back end's; whenever one of them says something it reads all of
`FrontSeen` anew, in one xenstore transaction, calls `step`, and carries the actions out in order before the next call.
"""

from dataclasses import dataclass, field
from typing import Final

from frontend_backend.xenbus_table import FRONT_TABLE, FrontLink, FrontSight, Move, XenbusState

MAX_TRIES: Final = 5
"""Openings in a row that come to nothing before a front end gives up: each end of a pair that cannot work together
would else take the other's closing for a new chance, for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSeen:
    """What xenstore says about one device `device/vtpm/<n>` now.

    `front_state` None: our node is gone. `backend`, `backend_id`: as the toolstack wrote them.
    """

    front_state: XenbusState | None
    backend: str | None
    backend_id: int | None
    back_state: XenbusState | None
    feature: bytes | None  # the back end's feature-protocol-v2
    extra_pages: int = 0  # the back end's feature-extra-pages, 0 if there is none


@dataclass(frozen=True, slots=True)
class Offer:
    """Offer 1 + extra_pages pages to the domain and make an unbound channel; then `offered` or `offer_failed`. Last."""

    domain: int
    extra_pages: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Write ring-ref, event-channel and feature-protocol-v2=1 in one transaction, unless our node is gone."""


@dataclass(frozen=True, slots=True)
class SetFrontState:
    """Write our `state`, unless the node is gone: in a transaction that reads it first (a write would make it anew)."""

    state: XenbusState


@dataclass(frozen=True, slots=True)
class Start:
    """The back end has connected: start the bridge."""


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Stop the bridge, close the channel, withdraw the pages."""


@dataclass(frozen=True, slots=True)
class Unpublish:
    """Remove ring-ref and event-channel, if they are there."""


@dataclass(frozen=True, slots=True)
class FrontComplain:
    """Tell the log what is wrong."""

    text: str


FrontAction = Offer | Publish | SetFrontState | Start | Withdraw | Unpublish | FrontComplain

_SIGHTS: Final = {
    None: FrontSight.BACK_GONE,
    XenbusState.INITIALISING: FrontSight.BACK_STARTING,
    XenbusState.INIT_WAIT: FrontSight.BACK_WAITING,
    XenbusState.CLOSING: FrontSight.BACK_CLOSING,
    XenbusState.CLOSED: FrontSight.BACK_CLOSED,
}
_READY: Final = (XenbusState.INITIALISED, XenbusState.CONNECTED)
_BLANK: Final = (XenbusState.INITIALISING, XenbusState.CLOSED)


@dataclass(slots=True)
class FrontDevice:
    """The machine. `extra_pages`: how many we would use; the back end's offer may be lower."""

    extra_pages: int = field(default=0, kw_only=True)
    link: FrontLink = field(default=FrontLink.NEW, init=False)
    _written: XenbusState | None = field(default=None, init=False)
    _backend: tuple[str | None, int | None] = field(default=(None, None), init=False)
    _published: bool = field(default=False, init=False)
    _tries: int = field(default=0, init=False)

    def step(self, seen: FrontSeen) -> list[FrontAction]:
        """Return what is to be done now that the world is as `seen`."""
        actions: list[FrontAction] = []
        for _ in range(3):  # a device that was replaced, then what a front end before us left, then the opening
            was = self.link
            self._walk(seen, actions)
            if self.link is was or self.link not in (FrontLink.NEW, FrontLink.LEAVING):
                break
            if was not in (FrontLink.NEW, FrontLink.LEAVING) and self.link is FrontLink.LEAVING:
                break  # the back end has not seen yet that we left
        return actions

    def offered(self) -> list[FrontAction]:
        """Take note that `Offer` succeeded."""
        assert self.link is FrontLink.OPENING, self.link
        self._published = True
        return [Publish(), *self._set(XenbusState.INITIALISED)]

    def offer_failed(self, why: str) -> list[FrontAction]:
        """Take note that `Offer` failed, and that nothing is left of it."""
        assert self.link is FrontLink.OPENING, self.link
        self.link = FrontLink.FAILED
        return [FrontComplain(why), *self._set(XenbusState.CLOSED)]

    def close(self) -> list[FrontAction]:
        """Return what is to be done before the front end ends of its own will: 5, nothing more to connect to, 6."""
        if self.link not in (FrontLink.OPENING, FrontLink.RUNNING):
            return []
        self.link = FrontLink.NEW
        return [*self._set(XenbusState.CLOSING), Withdraw(), *self._unpublish(), *self._set(XenbusState.CLOSED)]

    def _walk(self, seen: FrontSeen, actions: list[FrontAction]) -> None:
        sight = self._look(seen)
        moves, link = FRONT_TABLE[self.link, sight]
        if self.link is FrontLink.NEW:
            self._meet(seen)
            if seen.front_state in _BLANK:
                moves = ()
        if link is FrontLink.FAILED is not self.link:
            actions.append(FrontComplain("the back end does not speak protocol 2 (feature-protocol-v2)"))
        if Move.OFFER in moves and self._tries >= MAX_TRIES:
            moves, link = (), FrontLink.FAILED
            actions.append(FrontComplain(f"the back end closed {MAX_TRIES} times without connecting: given up"))
        for move in moves:
            self._carry_out(move, seen, actions)
        self.link = link

    def _meet(self, seen: FrontSeen) -> None:
        self._backend, self._written = (seen.backend, seen.backend_id), seen.front_state
        self._published = seen.front_state not in _BLANK  # perhaps, by one before us
        self._tries = 0

    def _look(self, seen: FrontSeen) -> FrontSight:
        if seen.front_state is None or seen.backend is None or seen.backend_id is None:
            return FrontSight.NODE_GONE
        if self.link is not FrontLink.NEW and self._is_another(seen):
            return FrontSight.REPLACED
        if seen.back_state in _READY:
            return FrontSight.BACK_READY if _speaks_2(seen.feature) else FrontSight.BACK_FOREIGN
        return _SIGHTS.get(seen.back_state, FrontSight.BACK_OTHER)

    def _is_another(self, seen: FrontSeen) -> bool:
        made_anew = seen.front_state is XenbusState.INITIALISING and self._written is not XenbusState.INITIALISING
        return made_anew or (seen.backend, seen.backend_id) != self._backend

    def _carry_out(self, move: Move, seen: FrontSeen, actions: list[FrontAction]) -> None:
        match move:
            case Move.TO_FRESH:
                actions += self._set(XenbusState.INITIALISING)
            case Move.TO_CLOSED:
                actions += self._unpublish()
                actions += self._set(XenbusState.CLOSED)
            case Move.OFFER:
                assert seen.backend_id is not None, seen
                self._tries += 1
                actions.append(Offer(seen.backend_id, min(self.extra_pages, seen.extra_pages)))
            case Move.START:
                self._tries = 0
                actions.append(Start())
                actions += self._set(XenbusState.CONNECTED)
            case Move.WITHDRAW:
                actions.append(Withdraw())
            case _:
                raise AssertionError(f"{move} is no front end's")

    def _set(self, state: XenbusState) -> list[FrontAction]:
        if self._written is state:
            return []
        self._written = state
        return [SetFrontState(state)]

    def _unpublish(self) -> list[FrontAction]:
        published, self._published = self._published, False
        return [Unpublish()] if published else []


def _speaks_2(feature: bytes | None) -> bool:
    """Tell whether a back end's feature-protocol-v2 is a number but 0, as Linux does."""
    return feature is not None and feature.isdigit() and int(feature[:16]) != 0
