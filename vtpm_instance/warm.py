"""Prepares the keeper so that what it forks is small and quick: everything used once before the first fork.

The TPM that runs here is thrown away and terminated: a running TPM must never be forked, its random numbers would
repeat in each child (reference/performance.md 2c). Nothing here is a secret of any vTPM.
"""

import gc
import os

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from frontend_backend.messages_instance import (
    InstanceState,
    Report,
    ReportReply,
    decode_reply,
    encode_reply,
    encode_request,
)
from frontend_backend.tpmhdr import TpmFamily
from vtpm_instance import tpm_commands as tpm
from vtpm_instance.libtpms import Tpm

_GET_RANDOM = bytes.fromhex("8001 0000000c 0000017b 0020")


def warm_up(emulator: Tpm) -> None:
    """Use each family, the cipher and the codec once, then freeze the heap.

    Raises:
        LibtpmsError: libtpms does not work here; no instance would.

    """
    for family in TpmFamily:
        emulator.start(family, {}, fresh=True)
        try:
            emulator.process(tpm.startup(family, tpm.Startup.CLEAR))
            if family is TpmFamily.TPM_2_0:
                emulator.process(_GET_RANDOM)
        finally:
            emulator.terminate()
    AESGCM(os.urandom(32)).encrypt(os.urandom(12), bytes(8192), None)
    encode_request(Report(InstanceState.READY))
    decode_reply(encode_reply(ReportReply()))
    freeze_heap()


def freeze_heap() -> None:
    """Keep the garbage collector from touching, and so from unsharing, the pages children share."""
    gc.collect()
    gc.disable()
    gc.freeze()
