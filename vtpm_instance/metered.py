"""A vTPM with quotas: commands and saves per second, and bytes of NV. One without has none of this code in its way.

Over a rate the answer is delayed, not refused. A refused command (TPM_RC_RETRY) is sent again at once by drivers and
libraries, up to their own limit, and then fails: it costs the host a command each time, and the guest its application.
A delayed answer costs nobody anything. It holds up this vTPM's commands only: control commands and cancels are served
meanwhile by the stand-in, and the delay is never longer than one command's share of a second.
What lives here: the arithmetic and what is counted. What must not: sockets, the manager.
"""

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from frontend_backend.tpmhdr import ResponseCode, TpmFamily, error_response
from vtpm_instance.condition import Condition
from vtpm_instance.keeping import Keeper
from vtpm_instance.libtpms import PERMANENT, Tpm
from vtpm_instance.tpm_commands import CODE_END, CODE_OFFSET, Startup
from vtpm_instance.vtpm import Cancellable, Vtpm

# bytes of a permanent state that nothing was defined in (libtpms 0.9.2, measured; a test compares)
FRESH_STATE: Final = {TpmFamily.TPM_2_0: 1299, TpmFamily.TPM_1_2: 1169}
INDEX_BYTES: Final = 39  # what an NV index takes beside its data, authorisation value and policy (likewise)
OBJECT_BYTES: Final = 2048  # kept free for a persistent object: an RSA-2048 key takes 1,174, larger ones more
_NV_DEFINE_20, _EVICT_CONTROL, _NV_DEFINE_12 = (code.to_bytes(4) for code in (0x12A, 0x120, 0xCC))
_NV_CHANGE_AUTH: Final = (0x13B).to_bytes(4)
_TRANSIENT: Final = 0x80  # first byte of a transient object's handle (TPM_HT_TRANSIENT): it is to become persistent
_NO_SPACE: Final = {TpmFamily.TPM_2_0: ResponseCode.NV_SPACE, TpmFamily.TPM_1_2: ResponseCode.TPM12_NOSPACE}
_NO_LIMIT: Final = float("inf")

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")


@dataclass(slots=True)
class Limits:
    """What a vTPM may use up: commands and saves a second, bytes of NV; 0 is no limit."""

    commands_per_second: int = 0
    saves_per_second: int = 0
    nv_bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.commands_per_second or self.saves_per_second or self.nv_bytes)


class Bucket:
    """A bucket of tokens that fills at `rate` a second and holds a second's worth. Time is an argument.

    It looks at the clock only when it is empty: a guest that stays below its rate costs one look a bucketful.
    """

    def __init__(self, rate: int, now: float) -> None:
        """Be full; a rate of 0 is no limit."""
        self._rate = float(rate) or _NO_LIMIT
        self._left = self._rate
        self._since = now

    def take(self, count: int, clock: Callable[[], float]) -> float:
        """Take tokens, and return for how many seconds to wait until what was taken is earned, 0 for not at all."""
        self._left -= count
        return 0.0 if self._left >= 0.0 else self._settle(count, clock())

    def _settle(self, count: int, now: float) -> float:
        earned = max(0.0, now - self._since) * self._rate
        self._since = now
        self._left = min(self._rate, self._left + count + earned) - count
        return max(0.0, -self._left / self._rate)


class MeteredVtpm(Vtpm):
    """A vTPM whose guest is held to `limits`."""

    def __init__(
        self,
        emulator: Tpm,
        keeper: Keeper,
        family: TpmFamily,
        after_reset: Startup,
        announce: Callable[[Condition, Exception | None], None],
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Run as `Vtpm` does; `clock` tells seconds, `pause` lets some pass."""
        super().__init__(emulator, keeper, family, after_reset, announce)
        self._clock, self._pause = clock, pause
        self._commands_left = Bucket(limits.commands_per_second, clock())
        self._saves_left = Bucket(limits.saves_per_second, clock())
        self._most = limits.nv_bytes + FRESH_STATE[family] if limits.nv_bytes else 0
        self._no_space = error_response(family, _NO_SPACE[family])

    def execute_placed(self, size: int, locality: int, origin: Cancellable | None = None) -> bytes:
        """Answer a command as `Vtpm` does, but not sooner than its guest's share allows."""
        if self._most and not self._has_nv_for(bytes(self.commands[:size])):
            response, saved = self._no_space, 0
        else:
            before = self._keeper.generation
            response = super().execute_placed(size, locality, origin)
            saved = self._keeper.generation - before
        wait = max(self._commands_left.take(1, self._clock), self._saves_left.take(max(saved, 0), self._clock))
        if wait:
            with self.beside_long(None):  # control commands are served meanwhile
                self._pause(wait)
        return response

    def power_on(self, *, delete_volatile: bool = True) -> None:
        """Switch on as `Vtpm` does; what that saved counts, or who resets all the time would save without end."""
        before = self._keeper.generation
        try:
            super().power_on(delete_volatile=delete_volatile)
        finally:
            self._pay_for_saves(before)

    def power_off(self) -> None:
        """Switch off as `Vtpm` does; what that saved counts."""
        before = self._keeper.generation
        try:
            super().power_off()
        finally:
            self._pay_for_saves(before)

    def _pay_for_saves(self, before: int) -> None:
        # Nobody stands in: what follows on the same control connection must not be answered first.
        wait = self._saves_left.take(max(self._keeper.generation - before, 0), self._clock)
        if wait:
            self._pause(wait)

    def _has_nv_for(self, command: bytes) -> bool:
        growth = growth_of(self.family, command)
        return not growth or len(self._keeper.blobs.get(PERMANENT, b"")) + growth <= self._most


def growth_of(family: TpmFamily, command: bytes) -> int:
    """Return how many bytes a guest's command asks to add to the permanent state; 0 also where it makes no sense.

    Source: TPM 2.0 Part 3, 31.3 (NV_DefineSpace), 28.5 (EvictControl), 31.16 (NV_ChangeAuth); TPM 1.2 Part 3, 20.1.
    """
    code = command[CODE_OFFSET:CODE_END]
    try:
        if family is TpmFamily.TPM_1_2:
            return _size_of_12(command) + INDEX_BYTES if code == _NV_DEFINE_12 else 0
        if code == _NV_DEFINE_20:
            return _size_of_20(command) + INDEX_BYTES
        if code == _NV_CHANGE_AUTH:  # the value that it replaces may be empty
            return int(_U16.unpack_from(command, _after_authorisations(command))[0])
        return OBJECT_BYTES if code == _EVICT_CONTROL and command[14] == _TRANSIENT else 0
    except (struct.error, IndexError):
        return 0  # libtpms says what is wrong with it


def _after_authorisations(command: bytes) -> int:
    """Return where the parameters begin of a command with one handle and authorisations, their size first."""
    at = CODE_END + 4
    return at + 4 + int(_U32.unpack_from(command, at)[0])


def _size_of_20(command: bytes) -> int:
    """Return the bytes of an index's data, authorisation value and policy.

    After the authorisations TPM2B_AUTH and TPM2B_NV_PUBLIC (size, index, name's algorithm, attributes, policy, data
    size).
    """
    at = _after_authorisations(command)
    (auth,) = _U16.unpack_from(command, at)
    at += 2 + auth + 2 + 10
    (policy,) = _U16.unpack_from(command, at)
    (data,) = _U16.unpack_from(command, at + 2 + policy)
    return int(auth + policy + data)


def _size_of_12(command: bytes) -> int:
    """Return the bytes of data in a TPM_NV_DATA_PUBLIC (TPM 1.2 Part 2, 19.3)."""
    at = CODE_END + 2 + 4
    for _ in ("read", "write"):  # TPM_PCR_INFO_SHORT: selection with its size, localities, digest
        at += 2 + _U16.unpack_from(command, at)[0] + 1 + 20
    return int(_U32.unpack_from(command, at + 6 + 3)[0])  # after TPM_NV_ATTRIBUTES and three truth values
