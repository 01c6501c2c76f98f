"""Prepares the keeper so that what it forks is small and quick: everything used before the first fork.

Python rewrites its byte code while it learns a path, and fills caches when it walks one first; done here, once, the
pages with the results are shared by all instances. The TPM that runs here is thrown away and terminated: a running TPM
must never be forked, its random numbers would repeat in each child (reference/performance.md 2c). Nothing here is a
secret of any vTPM.
"""

import gc
import os
from typing import Final
from uuid import UUID

from frontend_backend.local import LocalRing
from frontend_backend.messages_instance import (
    Commit,
    CommitReply,
    InstanceState,
    Load,
    LoadReply,
    Reply,
    Report,
    ReportReply,
    Request,
    decode_reply,
    encode_reply,
    encode_request,
    refusal_for_malformed,
)
from frontend_backend.ring import BackRing, FrontRing
from frontend_backend.tpmhdr import TpmFamily
from storage.state_image import Family, StateImage
from vtpm_instance import tpm_commands as tpm
from vtpm_instance.framing import CommandStream
from vtpm_instance.libtpms import Tpm

ROUNDS: Final = 16  # CPython 3.11 specialises byte code after 8 runs (PEP 659)
_GET_RANDOM: Final = bytes.fromhex("8001 0000000c 0000017b 0020")
_NOBODY: Final = UUID(int=0)
_IMAGE_BYTES: Final = 64 * 1024


def warm_up(emulator: Tpm) -> None:
    """Walk the paths of an instance on throw-away parts, then freeze the heap.

    Raises:
        LibtpmsError, StorageError, OSError: a part does not work here; no instance would.

    """
    for family in TpmFamily:
        emulator.start(family, {}, fresh=True)
        try:
            emulator.process(tpm.startup(family, tpm.Startup.CLEAR))
            for _ in range(ROUNDS):
                _serve_one(emulator, family)
        finally:
            emulator.terminate()
    _rehearse_images()
    _rehearse_ring()
    freeze_heap()


def _serve_one(emulator: Tpm, family: TpmFamily) -> None:
    stream = CommandStream()
    stream.feed(_GET_RANDOM if family is TpmFamily.TPM_2_0 else tpm.shutdowns(family)[0])
    emulator.process(stream.next_command() or b"")


def _rehearse_images() -> None:
    descriptor = os.memfd_create("vtpm-rehearsal", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, _IMAGE_BYTES)
        image = StateImage.create(descriptor, _NOBODY, _NOBODY, Family.TPM20)
        for generation in range(1, ROUNDS):
            saved = image.save({"permall": bytes(2048)}, generation)
            image.switch()
            image = StateImage.open(descriptor, _NOBODY)
            image.load(saved.key, saved.digest, generation)
    finally:
        os.close(descriptor)


def _rehearse_ring() -> None:
    requests: tuple[Request, ...] = (Load(), Commit(1, bytes(32), bytes(32), 1), Report(InstanceState.READY))
    load_reply = LoadReply(_NOBODY.bytes, "2.0", 1, False, bytes(32), bytes(32), 1, "clear", 1.0)
    replies: tuple[Reply, ...] = (load_reply, CommitReply(1), ReportReply())
    front_end, back_end = LocalRing.pair()
    with front_end, back_end:
        front, back = FrontRing(front_end.page), BackRing(back_end.page, refusal_for_malformed)
        for _ in range(ROUNDS):
            for request, reply in zip(requests, replies, strict=True):
                front.submit(encode_request(request))
                front_end.ring()
                back.take()
                back.finish(encode_reply(reply))
                back_end.ring()
                front_end.drain()
                decode_reply(front.poll() or b"")


def freeze_heap() -> None:
    """Keep the garbage collector from touching, and so from unsharing, the pages children share."""
    gc.collect()
    gc.disable()
    gc.freeze()
