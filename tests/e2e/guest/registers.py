"""In the guest with a CRB: commands through `crb:`, and what is said of settings that do not fit this machine."""

import hashlib
import time

from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import TpmError
from manager.hwtpm_setting import TctiSetting
from manager.hwtpm_tis_transport import RegisterTransport

with HardwareTpm.open(TctiSetting.parse("crb:locality=0"), locality=0) as tpm:
    first, second = tpm.random(600), tpm.random(600)
    tpm.provision_srk()
    assert first != second
    print(f"random {len(first)} {len(second)} {len(hashlib.sha256(first).digest())}; SRK provisioned")
for text in (
    "crb:locality=2",
    "tis:locality=0",
    "tis:base=0xfed50000",
    "crb:base=0xfed50000",
    "tis:path=/dev/none",
    "tis:path=/dev/null",
):
    try:
        RegisterTransport(TctiSetting.parse(text), time.monotonic() + 5)
    except TpmError as error:
        print(f"{text} | {type(error).__name__} | {int(error.code)} | {error}")
    else:
        print(f"{text} | nothing was said")
