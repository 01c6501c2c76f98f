"""In the guest: unseal the store's platform object at two localities, as whoever has the disk could try."""

import os
import time
from pathlib import Path

from manager.config import Config
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import TpmError
from manager.hwtpm_setting import TctiSetting
from manager.hwtpm_tis_transport import RegisterTransport
from manager.keys import BootArea
from storage.store import Store

# TPM2_PCR_Extend(1) by one SHA-256 value: Part 3, 22.2
EXTEND_PCR_1 = bytes.fromhex("8002 00000041 00000182 00000001 00000009 40000009 0000 00 0000 00000001 000b" + "5a" * 32)


def code_behind(error: BaseException | None) -> int:
    while error is not None and not hasattr(error, "rc"):
        error = error.__cause__ or error.__context__
    return 0 if error is None else int(error.rc)


def extend_pcr_1() -> None:
    deadline = time.monotonic() + 10
    transport = RegisterTransport(TctiSetting.parse("tis:locality=2"), deadline)
    answer = transport.exchange(EXTEND_PCR_1, deadline)
    assert answer[6:10] == bytes(4), answer.hex()
    transport.close()


def attempt(boot: BootArea, srk_name: str, locality: int) -> str:
    setting = TctiSetting.parse(f"tis:locality={locality}")
    with HardwareTpm.open(setting, locality=locality) as tpm:
        tpm.open_srk(bytes.fromhex(srk_name))
        try:
            return f"unsealed {len(tpm.unseal(boot.platform))} bytes"
        except TpmError as error:
            return f"{type(error).__name__} 0x{code_behind(error):x} exit {int(error.code)}: {error}"


descriptor = os.open("/data/state/store.img", os.O_RDONLY)
area = BootArea.unpack(Store.read_boot_area(descriptor)[1])
name = Config.load(Path("/data/state/config.toml")).tpm.srk_name
print("at locality 2 |", attempt(area, name, 2))
print("at locality 0 |", attempt(area, name, 0))
extend_pcr_1()
print("at locality 2 with another PCR 1 |", attempt(area, name, 2))
