"""What nobody could be quicker than, measured in the same run: it shows where the rest of a number goes."""

import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

import vtpm_instance_commands as tpm
from subjects import CONTENT_BYTES, INDEX, READS, TpmError
from timing import Call

from frontend_backend.tpmhdr import TpmFamily
from storage.secrets import GroupKey, StoreKey
from storage.state_image import Family, StateImage
from storage.store import GroupRecord, PutGroup, PutVtpm, Store, VtpmRecord
from vtpm_instance.libtpms import Tpm

BLOCK = 4096  # bytes of one write of the disk's floor
_FILE_BYTES = 1 << 20
_BLOB = {"permall": bytes(1400)}  # a state of the size that a TPM with one NV index has


@contextmanager
def echo_server(answer_bytes: int) -> Iterator[tuple[int, Call]]:
    """Run a Python process that polls, receives, sends: the least a server in Python does. Yields (pid, a round trip).

    It shares its code with nothing of ours.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            _echo(theirs, bytes(answer_bytes))
        finally:
            os._exit(0)
    theirs.close()

    def round_trip() -> None:
        ours.sendall(READS["GetRandom"])
        ours.recv(4096)

    try:
        yield pid, round_trip
    finally:
        ours.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _echo(sock: socket.socket, answer: bytes) -> None:
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    while True:
        poll.poll(None)
        if not sock.recv(4096):
            return
        sock.send(answer)


@contextmanager
def libtpms_alone() -> Iterator[dict[str, Call]]:
    """Run libtpms in this process, through the product's own binding; yields a call for each of READS."""
    emulator = Tpm()
    emulator.start(TpmFamily.TPM_2_0, {}, fresh=True)

    def run(packet: bytes) -> None:
        code = int.from_bytes(emulator.process(packet)[6:10])
        if code:
            raise TpmError(code)

    try:
        for packet in (
            tpm.STARTUP_CLEAR,
            tpm.nv_define(INDEX, CONTENT_BYTES),
            tpm.nv_write(INDEX, bytes(CONTENT_BYTES)),
        ):
            run(packet)
        yield {name: partial(emulator.process, packet) for name, packet in READS.items()}
    finally:
        emulator.terminate()


@contextmanager
def two_flushes(directory: Path) -> Iterator[Call]:
    """Yield a call that writes a block to each of two preallocated files and flushes each: what a save must cost."""
    descriptors = [_filled(directory / f"floor-{number}") for number in (0, 1)]
    count = 0

    def write_twice() -> None:
        nonlocal count
        count += 1
        content = struct.pack(">Q", count) * (BLOCK // 8)
        for descriptor in descriptors:
            os.pwrite(descriptor, content, count % 2 * BLOCK)
            os.fdatasync(descriptor)

    try:
        yield write_twice
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@contextmanager
def one_flush(directory: Path) -> Iterator[Call]:
    """Yield a call that writes a block to a preallocated file and flushes it."""
    descriptor = _filled(directory / "floor-one")
    count = 0

    def write() -> None:
        nonlocal count
        count += 1
        os.pwrite(descriptor, struct.pack(">Q", count) * (BLOCK // 8), count % 2 * BLOCK)
        os.fdatasync(descriptor)

    try:
        yield write
    finally:
        os.close(descriptor)


def _filled(path: Path) -> int:
    """Make a file whose blocks are allocated and written, so that a later flush has no metadata to write."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.pwrite(descriptor, b"\xff" * _FILE_BYTES, 0)
    os.fsync(descriptor)
    return descriptor


@contextmanager
def storage_alone(directory: Path) -> Iterator[Call]:
    """Yield a call that saves a state and commits its record, in one process, by the product's own storage code."""
    vtpm, group, store_uuid = uuid4(), uuid4(), uuid4()
    image_fd = os.open(directory / "floor.img", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    store_fd = os.open(directory / "floor-store.img", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    image = StateImage.create(image_fd, vtpm, store_uuid, Family.TPM20)
    store = Store.create(store_fd, store_uuid, StoreKey.new(), b"")
    generation = 0

    def save() -> None:
        nonlocal generation
        generation += 1
        saved = image.save(_BLOB, generation)
        store.commit([PutVtpm(VtpmRecord(vtpm, group, saved.key, saved.digest, generation))])
        image.switch()

    try:
        store.commit([PutGroup(GroupRecord(group), GroupKey.new())])
        yield save
    finally:
        store.close()
        os.close(image_fd)
        os.close(store_fd)
