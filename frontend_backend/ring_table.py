"""The states of the ring: one table, and what is derived from it.

Everything about states lives in TRANSITIONS; both ends (`ring`) ask here, and the document's table is made from it.
Source: xen/include/public/io/tpmif.h version 2.
"""

from enum import Enum, auto
from typing import Final

from frontend_backend.errors import IllegalTransitionError
from frontend_backend.tpmif import BYTE_MASK, RingState


class RingEvent(Enum):
    """What either side can do to the ring."""

    FRONT_SUBMITS = auto()
    FRONT_CANCELS = auto()
    BACK_FINISHES = auto()
    BACK_ABORTS = auto()


_S, _E = RingState, RingEvent
TRANSITIONS: Final[dict[tuple[RingState, RingEvent], RingState]] = {
    (_S.IDLE, _E.FRONT_SUBMITS): _S.SUBMIT,
    (_S.FINISH, _E.FRONT_SUBMITS): _S.SUBMIT,
    # "at any time" (tpmif.h): a cancel races with the back end's answer, and a late one finds IDLE or FINISH
    (_S.SUBMIT, _E.FRONT_CANCELS): _S.CANCEL,
    (_S.CANCEL, _E.FRONT_CANCELS): _S.CANCEL,
    (_S.FINISH, _E.FRONT_CANCELS): _S.CANCEL,
    (_S.IDLE, _E.FRONT_CANCELS): _S.CANCEL,
    (_S.SUBMIT, _E.BACK_FINISHES): _S.FINISH,
    (_S.CANCEL, _E.BACK_FINISHES): _S.FINISH,
    (_S.SUBMIT, _E.BACK_ABORTS): _S.IDLE,
    (_S.CANCEL, _E.BACK_ABORTS): _S.IDLE,
}


def advance(state: RingState, event: RingEvent) -> RingState:
    """Return the state that `event` leads to.

    Raises:
        IllegalTransitionError: the pair is not in TRANSITIONS.

    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransitionError(state.name, event.name) from None


def _permits(event: RingEvent) -> tuple[bool, ...]:
    """Return for each value of the state byte whether `event` may follow it; a state that does not exist never may."""
    permitted = {int(state) for state, what in TRANSITIONS if what is event}
    return tuple(state in permitted for state in range(BYTE_MASK + 1))


MAY_SUBMIT: Final = _permits(RingEvent.FRONT_SUBMITS)
MAY_FINISH: Final = _permits(RingEvent.BACK_FINISHES)
