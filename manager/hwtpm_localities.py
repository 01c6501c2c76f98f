"""Which localities of its TPM this machine grants, tried out: for `vtpm-manager check`. Needs no tpm2_pytss.

At each locality PCR 20 is reset, which a TPM allows at locality 2 only: what it answers tells at which one it sees us.
Locality 4 is the chipset's and cannot be had by software on a healthy machine.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from manager.hwtpm_errors import TpmError
from manager.hwtpm_setting import TctiKind, TctiSetting
from manager.hwtpm_tis_errors import DriverBound, MemoryDenied, PathMissing, WrongInterface
from manager.hwtpm_tis_page import bound_drivers
from manager.hwtpm_tis_place import LOCALITIES
from manager.hwtpm_tis_transport import RegisterTransport
from manager.hwtpm_transport import HEADER

# TPM2_PCR_Reset(20) with an empty password: Part 3, 22.8; PCR 20 is the probe of the locality, never PCR 22.
RESET_PCR_20: Final = bytes.fromhex("80020000001b0000013d00000014000000094000000900000000" + "00")
TRY_SECONDS: Final = 5.0  # for each locality; it may have to wait for another user's command
# The same for every page: asking on would only repeat it.
_OF_EVERY_PAGE: Final = (PathMissing, MemoryDenied, DriverBound)


@dataclass(frozen=True, slots=True)
class Granted:
    """What came of trying one locality; None stands for all of them. `usable`: the TPM took a command there."""

    locality: int | None
    usable: bool
    text: str


def survey(setting: TctiSetting) -> Iterator[Granted]:
    """Try the localities of the TPM with these registers (or, for `device:`, at the usual address).

    Nobody else may use the TPM meanwhile: a lower locality that keeps it is seized, as the driver does.
    """
    for bound in bound_drivers():
        yield Granted(
            None,
            usable=False,
            text=f"the kernel's driver {bound.driver} is bound to {bound.device}, so other programs use the TPM at "
            "locality 0, and may keep us from its registers",
        )
    if setting.kind not in {TctiKind.TIS, TctiKind.CRB}:
        setting = TctiSetting.parse("tis")
    for locality in LOCALITIES:
        try:
            yield _try(replace(setting, locality=locality))
        except _OF_EVERY_PAGE as error:
            yield Granted(None, usable=False, text=str(error))
            return


def _try(setting: TctiSetting) -> Granted:
    try:
        code = _reset_pcr_20(setting)
    except WrongInterface:
        other = TctiKind.CRB if setting.kind is TctiKind.TIS else TctiKind.TIS
        return _try(replace(setting, kind=other, text=other.value))
    except _OF_EVERY_PAGE:
        raise
    except TpmError as error:
        return Granted(setting.locality, usable=False, text=f"not granted: {error.happened}")
    except TimeoutError:
        return Granted(setting.locality, usable=False, text=f"granted, but there is no answer in {TRY_SECONDS:g} s")
    except OSError as error:
        return Granted(setting.locality, usable=False, text=f"not granted: {error}")
    return Granted(setting.locality, usable=True, text=f"granted through {setting.kind.value}:, {_meaning(code)}")


def _meaning(code: int) -> str:
    match code:
        case 0:
            return "the TPM sees us at locality 2 (PCR 20 can be reset)"
        case 0x907:
            return "the TPM sees us at another locality than 2 (PCR 20 cannot be reset)"
        case 0x100:
            return "but the TPM was not started (TPM2_Startup is the firmware's)"
        case _:
            return f"but resetting PCR 20 gives 0x{code:x}"


def _reset_pcr_20(setting: TctiSetting) -> int:
    deadline = time.monotonic() + TRY_SECONDS
    transport = RegisterTransport(setting, deadline)
    try:
        return int(HEADER.unpack_from(transport.exchange(RESET_PCR_20, deadline))[2])
    finally:
        transport.close()
