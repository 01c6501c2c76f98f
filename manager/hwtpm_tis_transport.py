"""A TPM's registers as a Transport: steps the tables of hwtpm_tis and hwtpm_crb, sleeping in between.

The locality is taken for each command and given back after it, so that the kernel's driver at locality 0, where there
is one, is never kept waiting for longer than a command.
"""

import logging
import time
from typing import Final

from manager.hwtpm_crb import CrbExchange
from manager.hwtpm_errors import WrongLocality
from manager.hwtpm_setting import TctiKind, TctiSetting
from manager.hwtpm_tis import FifoExchange
from manager.hwtpm_tis_page import RegisterPage, bound_drivers
from manager.hwtpm_tis_place import Place

_log = logging.getLogger("vtpm.tis")
# A register takes about a microsecond; most commands are over in a few hundred. Linux polls every 100 us to 5 ms.
EAGER_POLLS: Final = 16
FIRST_PAUSE_SECONDS: Final = 0.00005
LONGEST_PAUSE_SECONDS: Final = 0.005


class RegisterTransport:
    """A TPM at one locality by its registers; see Transport. Opening it proves that the locality is granted."""

    def __init__(self, setting: TctiSetting, deadline: float) -> None:
        self.place = Place(setting.kind.value, setting.base, setting.locality)
        self.localities: tuple[int, ...] = (setting.locality,)
        bound = bound_drivers()
        # With a driver of the kernel beside us other programs have handles too, and locality 0 is given back by itself.
        self.owns_handles = not bound
        self._exchange: type[FifoExchange | CrbExchange]
        self._exchange = FifoExchange if setting.kind is TctiKind.TIS else CrbExchange
        self._page = RegisterPage(setting.path, self.place)
        try:
            self._run(None, deadline)
        except BaseException:
            self._page.close()
            raise

    def exchange(self, command: bytes, deadline: float) -> bytes:
        """See Transport. At the deadline the command is cancelled; what the TPM still answers to that counts."""
        return self._run(command, deadline)

    def _run(self, command: bytes | None, deadline: float) -> bytes:
        machine = self._exchange(
            self._page,
            self.place,
            command,
            command_end=deadline,
            command_seconds=round(deadline - time.monotonic(), 1),
            may_seize=self.owns_handles,
        )
        try:
            polls, pause = 0, FIRST_PAUSE_SECONDS
            while machine.state is not machine.DONE:
                if machine.step(time.monotonic()):
                    polls, pause = 0, FIRST_PAUSE_SECONDS
                    continue
                polls += 1
                if polls > EAGER_POLLS:
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        except BaseException:
            machine.abandon()
            raise
        if machine.seized:
            _log.info("seized the TPM at %s from a lower locality, which had kept it", self.place)
        return machine.response

    def set_locality(self, locality: int, deadline: float) -> None:  # noqa: ARG002 - the protocol's shape
        """See Transport."""
        if locality != self.place.locality:
            raise WrongLocality(locality, f"only the page of locality {self.place.locality} is mapped")

    def close(self) -> None:
        """See Transport."""
        self._page.close()
