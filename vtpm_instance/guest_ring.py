"""The front end `xen`: a ring whose peer passes on what a Xen guest submits, with the terms of its attachment.

Like the front end `ring`, but a command may use another page, so that the 4096 bytes of libtpms' buffer are all of use,
and may come at the localities that the attachment allows. What Linux' driver never does is left to methods of its own.
Source: xen/include/public/io/tpmif.h version 2; reference/xen-vtpm.md 1.3, 3.3.
"""

import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from frontend_backend.local import LocalRing
from frontend_backend.tpmhdr import HEADER_SIZE, ResponseCode, TpmFamily, error_response
from vtpm_instance.framing import announced
from vtpm_instance.journal import note
from vtpm_instance.ring_port import TOO_LONG, ServedRing
from vtpm_instance.tpm_commands import CODE_END, CODE_OFFSET, code_of, maintenance_commands
from vtpm_instance.vtpm import Vtpm, wrong_size_response

PAGES: Final = 2  # of a ring: 8180 bytes of packet, and libtpms takes 4096
_BAD_LOCALITY: Final = {TpmFamily.TPM_2_0: ResponseCode.LOCALITY, TpmFamily.TPM_1_2: ResponseCode.TPM12_BAD_LOCALITY}


@dataclass(slots=True)
class GuestTerms:
    """What the guest may: bit map of `localities`, TPM 1.2's `maintenance` commands; `trace` notes each command."""

    localities: int = 1
    maintenance: bool = False
    trace: bool = False


class GuestRing(ServedRing):
    """The back end of a guest's ring."""

    def __init__(self, ring: LocalRing, vtpm: Vtpm, gone: Callable[[ServedRing], None], terms: GuestTerms) -> None:
        """Answer what comes over `ring`, as ServedRing does, within `terms`."""
        super().__init__(ring, vtpm, gone)
        self._localities = terms.localities
        self._withheld = frozenset() if terms.maintenance else maintenance_commands(vtpm.family)
        self._trace = terms.trace

    def on_doorbell(self, events: int) -> None:
        """Answer what has been submitted; `events` is what epoll says."""
        self._heard += 1
        if self._heard >= self._drain_at:
            self._heard = 0
            self._ring.drain()
        taken = self._take(self._commands)
        if taken is not None:
            if isinstance(taken, int):
                self._finish(self._answer(taken))
            self._wake()
        if events & select.EPOLLHUP:
            self._gone(self)

    def _answer(self, size: int) -> bytes:
        commands, locality, family = self._commands, self._back.locality, self._vtpm.family
        if size < HEADER_SIZE or announced(commands)[0] != size:
            return wrong_size_response(family)
        code = commands[CODE_OFFSET:CODE_END]
        if not self._localities >> locality & 1:
            answer = error_response(family, _BAD_LOCALITY[family])
        elif code in self._withheld:
            answer = error_response(family, ResponseCode.TPM12_BAD_ORDINAL)
        else:
            answer = self._execute(size, locality, self._back)
            if len(answer) > self._back.answer_room:
                answer = error_response(family, TOO_LONG[family])
        if self._trace:
            _note(code, size, locality, answer)
        return answer


def _note(code: bytes, size: int, locality: int, answer: bytes) -> None:
    """Note a command by what anybody may know of it: never its parameters, nor those of the answer."""
    result = f"{code_of(answer):#x}, {len(answer)} bytes"
    note(f"command 0x{code.hex()}, {size} bytes, locality {locality}: answered {result}")
