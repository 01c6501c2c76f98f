"""The states of a Xen device, as both ends write them to xenstore, and what each end does about the other's: tables.

Everything about states lives here; `xen_back` and `xen_front` look at the world, classify it as a Sight, and carry out
the moves of the table. Every pair is listed.

Source: xen/include/public/io/xenbus.h, and what Linux's xen-tpmfront, mini-os' tpmback and tpmfront and libxl do.
"""

from enum import Enum, IntEnum, auto
from typing import Final


class XenbusState(IntEnum):
    """`enum xenbus_state`, written to the key `state` of either end as a decimal number."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8


_MAX_TEXT: Final = 16  # bytes; a number that a peer wrote is looked at no further


def parse_number(untrusted_value: bytes | None, limit: int = 0xFFFF_FFFF) -> int | None:
    """Return a decimal number of 0 to `limit` that a peer wrote, None if it is none."""
    if untrusted_value is None or len(untrusted_value) > _MAX_TEXT or not untrusted_value.isdigit():
        return None
    number = int(untrusted_value)
    return number if number <= limit else None


def parse_state(untrusted_value: bytes | None) -> XenbusState | None:
    """Return the state that a key says; None if there is no such key, UNKNOWN if it says something else."""
    if untrusted_value is None:
        return None
    number = parse_number(untrusted_value, max(XenbusState))
    return XenbusState.UNKNOWN if number is None else XenbusState(number)


class BackLink(Enum):
    """How far a back end is with its device."""

    NEW = auto()  # nothing of ours is in xenstore yet, or a back end before us left it
    WAITING = auto()  # announced, state 2; nothing is mapped
    CONNECTED = auto()  # mapped and bound, state 4
    PARTING = auto()  # the front end is closing, so are we: state 5; nothing is mapped
    SHUT = auto()  # state 6 until the front end starts anew
    ENDED = auto()  # state 6 and the grant given back; only a new device at the same place is looked at


class BackSight(Enum):
    """What a back end sees; the first that applies. All from FRONT_GONE on are about the front end's state."""

    NODE_GONE = auto()  # our own node was removed
    REPLACED = auto()  # our node is another device's now, or was made anew
    ENDING = auto()  # the domain is dead, or the toolstack takes the device away (online 0)
    TOLD_TO_CLOSE = auto()  # somebody else wrote 5 or 6 to our state, and online is still 1
    FRONT_GONE = auto()  # there is no key `state`
    FRONT_ABSURD = auto()  # 0, or no state at all
    FRONT_FRESH = auto()  # 1 or 2: (re)started, resumed, about to publish
    FRONT_HALF = auto()  # 3 or 4 without usable ring-ref, event-channel and feature
    FRONT_READY = auto()  # 3 or 4, with a page and a channel that are not the connected ones
    FRONT_SERVED = auto()  # 3 or 4, with those that are connected, or that failed to connect
    FRONT_CLOSING = auto()  # 5
    FRONT_CLOSED = auto()  # 6
    FRONT_PAUSED = auto()  # 7 or 8, which no vTPM driver writes


class FrontLink(Enum):
    """How far a front end is with its device."""

    NEW = auto()  # whatever a front end before us left
    LEAVING = auto()  # nothing is offered; until the back end is ready to start anew
    OPENING = auto()  # offered, state 3
    RUNNING = auto()  # state 4
    FAILED = auto()  # given up, state 6, until the toolstack makes another device


class FrontSight(Enum):
    """What a front end sees; the first that applies. All from BACK_GONE on are about the back end's state."""

    NODE_GONE = auto()  # our own node was removed, or names no back end
    REPLACED = auto()  # another back end, or our node was made anew
    BACK_GONE = auto()  # there is no key `state`
    BACK_STARTING = auto()  # 1: it has not said yet what it can
    BACK_WAITING = auto()  # 2
    BACK_READY = auto()  # 3 or 4
    BACK_FOREIGN = auto()  # 3 or 4 without feature-protocol-v2
    BACK_CLOSING = auto()  # 5
    BACK_CLOSED = auto()  # 6
    BACK_OTHER = auto()  # 0, 7, 8, or no state at all


class Move(Enum):
    """What an end does."""

    ANNOUNCE = auto()  # the features
    TO_WAIT = auto()  # state 2
    TO_CLOSING = auto()  # state 5
    TO_CLOSED = auto()  # state 6
    CONNECT = auto()  # and state 4 when that succeeded
    DISCONNECT = auto()
    UNBIND = auto()
    REMOVE = auto()  # where no toolstack does it
    TO_FRESH = auto()  # state 1
    OFFER = auto()  # pages and a channel, and state 3
    START = auto()  # state 4
    WITHDRAW = auto()


_B, _S, _M = BackLink, BackSight, Move
BACK_TABLE: Final[dict[tuple[BackLink, BackSight], tuple[tuple[Move, ...], BackLink]]] = {
    # NEW. A toolstack waits for 2 (10 s), so it comes at once. What a back end before us left is taken over: with 4 on
    # both sides neither state changes, only page and channel are mapped and bound again.
    (_B.NEW, _S.NODE_GONE): ((), _B.NEW),
    (_B.NEW, _S.REPLACED): ((), _B.NEW),
    (_B.NEW, _S.ENDING): ((_M.TO_CLOSED, _M.UNBIND, _M.REMOVE), _B.ENDED),
    (_B.NEW, _S.TOLD_TO_CLOSE): ((_M.ANNOUNCE, _M.TO_WAIT), _B.WAITING),
    (_B.NEW, _S.FRONT_GONE): ((_M.ANNOUNCE, _M.TO_WAIT), _B.WAITING),
    (_B.NEW, _S.FRONT_ABSURD): ((_M.ANNOUNCE, _M.TO_WAIT), _B.WAITING),
    (_B.NEW, _S.FRONT_FRESH): ((_M.ANNOUNCE, _M.TO_WAIT), _B.WAITING),
    (_B.NEW, _S.FRONT_HALF): ((_M.ANNOUNCE, _M.TO_CLOSED), _B.SHUT),
    (_B.NEW, _S.FRONT_READY): ((_M.ANNOUNCE, _M.CONNECT), _B.CONNECTED),
    (_B.NEW, _S.FRONT_SERVED): ((_M.ANNOUNCE, _M.CONNECT), _B.CONNECTED),
    (_B.NEW, _S.FRONT_CLOSING): ((_M.ANNOUNCE, _M.TO_CLOSING), _B.PARTING),
    (_B.NEW, _S.FRONT_CLOSED): ((_M.ANNOUNCE, _M.TO_WAIT), _B.WAITING),
    (_B.NEW, _S.FRONT_PAUSED): ((_M.ANNOUNCE, _M.TO_WAIT), _B.WAITING),
    # WAITING. A front end that says 3 or 4 without what it takes is no conforming one (all is written in one
    # transaction before): 6 as mini-os. A closing one that never connected is Linux's kexec, which waits for our 5.
    # What a back end before us left (4) becomes 2 once its front end has closed.
    (_B.WAITING, _S.NODE_GONE): ((_M.UNBIND,), _B.NEW),
    (_B.WAITING, _S.REPLACED): ((_M.UNBIND,), _B.NEW),
    (_B.WAITING, _S.ENDING): ((_M.TO_CLOSED, _M.UNBIND, _M.REMOVE), _B.ENDED),
    (_B.WAITING, _S.TOLD_TO_CLOSE): ((_M.TO_CLOSED,), _B.SHUT),
    (_B.WAITING, _S.FRONT_GONE): ((_M.TO_WAIT,), _B.WAITING),
    (_B.WAITING, _S.FRONT_ABSURD): ((_M.TO_WAIT,), _B.WAITING),
    (_B.WAITING, _S.FRONT_FRESH): ((_M.TO_WAIT,), _B.WAITING),
    (_B.WAITING, _S.FRONT_HALF): ((_M.TO_CLOSED,), _B.SHUT),
    (_B.WAITING, _S.FRONT_READY): ((_M.CONNECT,), _B.CONNECTED),
    (_B.WAITING, _S.FRONT_SERVED): ((_M.TO_CLOSED,), _B.SHUT),  # it failed, and nothing changed since
    (_B.WAITING, _S.FRONT_CLOSING): ((_M.TO_CLOSING,), _B.PARTING),
    (_B.WAITING, _S.FRONT_CLOSED): ((_M.TO_WAIT,), _B.WAITING),
    (_B.WAITING, _S.FRONT_PAUSED): ((_M.TO_WAIT,), _B.WAITING),
    # CONNECTED. Nothing the front end writes but a state that means "I have stopped" or "I have started anew" ends it.
    (_B.CONNECTED, _S.NODE_GONE): ((_M.DISCONNECT, _M.UNBIND), _B.NEW),
    (_B.CONNECTED, _S.REPLACED): ((_M.DISCONNECT, _M.UNBIND), _B.NEW),
    (_B.CONNECTED, _S.ENDING): ((_M.DISCONNECT, _M.TO_CLOSED, _M.UNBIND, _M.REMOVE), _B.ENDED),
    (_B.CONNECTED, _S.TOLD_TO_CLOSE): ((_M.DISCONNECT, _M.TO_CLOSED), _B.SHUT),
    (_B.CONNECTED, _S.FRONT_GONE): ((_M.DISCONNECT, _M.TO_CLOSED), _B.SHUT),
    (_B.CONNECTED, _S.FRONT_ABSURD): ((_M.DISCONNECT, _M.TO_WAIT), _B.WAITING),
    (_B.CONNECTED, _S.FRONT_FRESH): ((_M.DISCONNECT, _M.TO_WAIT), _B.WAITING),
    (_B.CONNECTED, _S.FRONT_HALF): ((), _B.CONNECTED),
    # Started anew between two looks. 2 first, so that the front end's watch fires for the 4 that follows.
    (_B.CONNECTED, _S.FRONT_READY): ((_M.DISCONNECT, _M.TO_WAIT, _M.CONNECT), _B.CONNECTED),
    (_B.CONNECTED, _S.FRONT_SERVED): ((), _B.CONNECTED),
    (_B.CONNECTED, _S.FRONT_CLOSING): ((_M.DISCONNECT, _M.TO_CLOSING), _B.PARTING),
    (_B.CONNECTED, _S.FRONT_CLOSED): ((_M.DISCONNECT, _M.TO_WAIT), _B.WAITING),
    (_B.CONNECTED, _S.FRONT_PAUSED): ((), _B.CONNECTED),
    # PARTING. 6 of the front end leads to 2, as mini-os: Linux's driver, bound again, gives up where it finds our 6.
    (_B.PARTING, _S.NODE_GONE): ((_M.UNBIND,), _B.NEW),
    (_B.PARTING, _S.REPLACED): ((_M.UNBIND,), _B.NEW),
    (_B.PARTING, _S.ENDING): ((_M.TO_CLOSED, _M.UNBIND, _M.REMOVE), _B.ENDED),
    (_B.PARTING, _S.TOLD_TO_CLOSE): ((_M.TO_CLOSED,), _B.SHUT),
    (_B.PARTING, _S.FRONT_GONE): ((_M.TO_CLOSED,), _B.SHUT),
    (_B.PARTING, _S.FRONT_ABSURD): ((_M.TO_WAIT,), _B.WAITING),
    (_B.PARTING, _S.FRONT_FRESH): ((_M.TO_WAIT,), _B.WAITING),
    (_B.PARTING, _S.FRONT_HALF): ((), _B.PARTING),
    (_B.PARTING, _S.FRONT_READY): ((_M.TO_WAIT, _M.CONNECT), _B.CONNECTED),
    (_B.PARTING, _S.FRONT_SERVED): ((_M.TO_CLOSED,), _B.SHUT),
    (_B.PARTING, _S.FRONT_CLOSING): ((), _B.PARTING),
    (_B.PARTING, _S.FRONT_CLOSED): ((_M.TO_WAIT,), _B.WAITING),
    (_B.PARTING, _S.FRONT_PAUSED): ((), _B.PARTING),
    # SHUT. Only a front end that starts anew, or comes with another page or channel, is worth another try.
    (_B.SHUT, _S.NODE_GONE): ((_M.UNBIND,), _B.NEW),
    (_B.SHUT, _S.REPLACED): ((_M.UNBIND,), _B.NEW),
    (_B.SHUT, _S.ENDING): ((_M.TO_CLOSED, _M.UNBIND, _M.REMOVE), _B.ENDED),
    (_B.SHUT, _S.TOLD_TO_CLOSE): ((_M.TO_CLOSED,), _B.SHUT),
    (_B.SHUT, _S.FRONT_GONE): ((), _B.SHUT),
    (_B.SHUT, _S.FRONT_ABSURD): ((), _B.SHUT),
    (_B.SHUT, _S.FRONT_FRESH): ((_M.TO_WAIT,), _B.WAITING),
    (_B.SHUT, _S.FRONT_HALF): ((), _B.SHUT),
    (_B.SHUT, _S.FRONT_READY): ((_M.TO_WAIT, _M.CONNECT), _B.CONNECTED),
    (_B.SHUT, _S.FRONT_SERVED): ((), _B.SHUT),
    (_B.SHUT, _S.FRONT_CLOSING): ((), _B.SHUT),
    (_B.SHUT, _S.FRONT_CLOSED): ((_M.TO_WAIT,), _B.WAITING),
    (_B.SHUT, _S.FRONT_PAUSED): ((), _B.SHUT),
    # ENDED. A device that is taken away does not come back; another one at its place is NODE_GONE or REPLACED first.
    # The toolstack may write its 5 only after we saw the domain die, and then waits for our 6.
    **{(_B.ENDED, sight): ((), _B.ENDED) for sight in BackSight},
    (_B.ENDED, _S.ENDING): ((_M.TO_CLOSED,), _B.ENDED),
    (_B.ENDED, _S.NODE_GONE): ((), _B.NEW),
    (_B.ENDED, _S.REPLACED): ((), _B.NEW),
}

_F, _V = FrontLink, FrontSight
_LEAVE: Final = ((_M.WITHDRAW, _M.TO_CLOSED), _F.LEAVING)
FRONT_TABLE: Final[dict[tuple[FrontLink, FrontSight], tuple[tuple[Move, ...], FrontLink]]] = {
    # NEW. Pages and channel of a front end before us are gone; its back end must let go of them before we come.
    **{(_F.NEW, sight): ((_M.TO_CLOSED,), _F.LEAVING) for sight in FrontSight},
    (_F.NEW, _V.NODE_GONE): ((), _F.NEW),
    # LEAVING. mini-os' back end goes from 6 to 2 when it sees our 6, and only then may take another page.
    (_F.LEAVING, _V.NODE_GONE): ((), _F.NEW),
    (_F.LEAVING, _V.REPLACED): ((), _F.NEW),
    (_F.LEAVING, _V.BACK_GONE): ((), _F.LEAVING),
    (_F.LEAVING, _V.BACK_STARTING): ((), _F.LEAVING),  # how many extra pages it takes stands there before its 2
    (_F.LEAVING, _V.BACK_WAITING): ((_M.TO_FRESH, _M.OFFER), _F.OPENING),
    (_F.LEAVING, _V.BACK_READY): ((), _F.LEAVING),
    (_F.LEAVING, _V.BACK_FOREIGN): ((), _F.LEAVING),
    (_F.LEAVING, _V.BACK_CLOSING): ((), _F.LEAVING),
    (_F.LEAVING, _V.BACK_CLOSED): ((), _F.LEAVING),
    (_F.LEAVING, _V.BACK_OTHER): ((), _F.LEAVING),
    # OPENING.
    (_F.OPENING, _V.NODE_GONE): ((_M.WITHDRAW,), _F.NEW),
    (_F.OPENING, _V.REPLACED): ((_M.WITHDRAW,), _F.NEW),
    (_F.OPENING, _V.BACK_GONE): _LEAVE,
    (_F.OPENING, _V.BACK_STARTING): ((), _F.OPENING),
    (_F.OPENING, _V.BACK_WAITING): ((), _F.OPENING),
    (_F.OPENING, _V.BACK_READY): ((_M.START,), _F.RUNNING),
    (_F.OPENING, _V.BACK_FOREIGN): ((_M.WITHDRAW, _M.TO_CLOSED), _F.FAILED),
    (_F.OPENING, _V.BACK_CLOSING): _LEAVE,
    (_F.OPENING, _V.BACK_CLOSED): _LEAVE,
    (_F.OPENING, _V.BACK_OTHER): ((), _F.OPENING),
    # RUNNING. A back end that starts anew may find our page and channel as they are and pass 2 on its way to 4.
    (_F.RUNNING, _V.NODE_GONE): ((_M.WITHDRAW,), _F.NEW),
    (_F.RUNNING, _V.REPLACED): ((_M.WITHDRAW,), _F.NEW),
    (_F.RUNNING, _V.BACK_GONE): _LEAVE,
    (_F.RUNNING, _V.BACK_STARTING): ((), _F.RUNNING),
    (_F.RUNNING, _V.BACK_WAITING): ((), _F.RUNNING),
    (_F.RUNNING, _V.BACK_READY): ((), _F.RUNNING),
    (_F.RUNNING, _V.BACK_FOREIGN): ((), _F.RUNNING),
    (_F.RUNNING, _V.BACK_CLOSING): _LEAVE,
    (_F.RUNNING, _V.BACK_CLOSED): _LEAVE,
    (_F.RUNNING, _V.BACK_OTHER): ((), _F.RUNNING),
    # FAILED.
    **{(_F.FAILED, sight): ((), _F.FAILED) for sight in FrontSight},
    (_F.FAILED, _V.NODE_GONE): ((), _F.NEW),
    (_F.FAILED, _V.REPLACED): ((), _F.NEW),
}
