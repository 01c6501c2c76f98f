"""What the far side leaves with its holder (`relay_holder`), so that a successor can go on."""

import logging
import struct
from pathlib import Path
from typing import Final, Self

from frontend_backend.descriptors import close_all
from manager.relay_channels import Channel, Left, Session, inodes
from manager.relay_errors import RelayProtocolError
from manager.relay_frames import ChannelKind
from manager.relay_holder import KEY_BYTES, Held

_log = logging.getLogger("vtpm.relay")
_RUN_KEY: Final = bytes(KEY_BYTES)  # the item that names this far side's run


class Notes:
    """What is left, if there is a holder. A holder that has gone is told of once; the relay goes on without one."""

    def __init__(self, held: Held | None) -> None:
        """Leave things with `held`."""
        self._held = held

    @classmethod
    def begin(cls, path: Path, run_name: bytes) -> tuple[Self, bytes, list[tuple[Left, list[int]]]]:
        """Reach the holder; returns the name of this far side's run, and what a predecessor left, parents first.

        Raises:
            OSError: it cannot be reached.

        """
        held = Held.reach(path)
        found: list[tuple[Left, list[int]]] = []
        for key, note, descriptors in held.take():
            if key == _RUN_KEY:
                run_name = note
                continue
            try:
                found.append((Left.read(key, note), descriptors))
            except (RelayProtocolError, struct.error, UnicodeDecodeError) as error:
                _log.error("a note of the relay before cannot be read, its connection ends: %s", error)
                close_all(descriptors)
                held.drop(key)
        held.put(_RUN_KEY, run_name, ())
        found.sort(key=lambda item: item[0].opening.kind is ChannelKind.PASSED)
        return cls(held), run_name, found

    def leave(self, session: Session, channel: Channel) -> None:
        """Write down how a channel is, with those that belong to it."""
        if self._held is None:
            return
        try:
            for each in session.relatives(channel):
                descriptors = each.descriptors()
                seen, note, key = inodes(descriptors), each.note(session.name[0]), session.key(each.number)
                if seen != each.kept:
                    self._held.put(key, note, descriptors)
                    each.kept = seen
                elif each is channel:
                    self._held.note(key, note)
        except OSError as error:
            self._gone(error)

    def drop(self, session: Session, number: int) -> None:
        """Let go of a channel that was closed: its connections end."""
        if self._held is None:
            return
        try:
            self._held.drop(session.key(number))
        except OSError as error:
            self._gone(error)

    def _gone(self, error: OSError) -> None:
        _log.error("the holder is gone (%s): a restart of this relay would now switch the guests' TPMs off", error)
        self._held = None
