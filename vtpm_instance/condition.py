"""The conditions of a vTPM, and the table by which they change."""

from enum import Enum, auto
from typing import Final


class Condition(Enum):
    """What a vTPM is doing."""

    OFF = auto()  # not loaded yet, or loaded and switched off
    RUNNING = auto()
    FAILED = auto()  # every command is answered with a failure until a platform reset
    STOPPED = auto()


class Change(Enum):
    """What can happen to a vTPM."""

    STARTED = auto()
    FAILED = auto()
    STOPPED = auto()
    POWERED_OFF = auto()  # by its platform, which may switch it on again


TRANSITIONS: Final[dict[tuple[Condition, Change], Condition]] = {
    (Condition.OFF, Change.STARTED): Condition.RUNNING,
    (Condition.OFF, Change.FAILED): Condition.FAILED,
    (Condition.OFF, Change.STOPPED): Condition.STOPPED,
    (Condition.OFF, Change.POWERED_OFF): Condition.OFF,  # loaded and verified
    (Condition.RUNNING, Change.POWERED_OFF): Condition.OFF,
    (Condition.FAILED, Change.POWERED_OFF): Condition.OFF,
    (Condition.RUNNING, Change.STARTED): Condition.RUNNING,  # platform reset of a healthy vTPM
    (Condition.RUNNING, Change.FAILED): Condition.FAILED,
    (Condition.RUNNING, Change.STOPPED): Condition.STOPPED,
    (Condition.FAILED, Change.STARTED): Condition.RUNNING,  # platform reset
    (Condition.FAILED, Change.FAILED): Condition.FAILED,
    (Condition.FAILED, Change.STOPPED): Condition.STOPPED,
}


def without_frames(error: Exception) -> Exception:
    """Drop the tracebacks of an exception and of what led to it, and with them the local variables they keep alive."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
