"""What control commands do to the vTPM of this process: the `Machine` of its control sessions.

What lives here: what is allowed in which state, and the results. What must not: bytes of the protocol (`control`),
sockets beyond the one that is passed (`server`), and the state itself (`power`).
"""

import os
import socket
import stat
from collections.abc import Callable
from typing import Protocol

from storage.errors import StorageError
from vtpm_instance.condition import Condition
from vtpm_instance.control_machine import BlobKind, InitFlags, Result
from vtpm_instance.errors import InstanceError, LibtpmsError
from vtpm_instance.front_ends import Rules
from vtpm_instance.journal import note
from vtpm_instance.libtpms import Tpm
from vtpm_instance.vtpm import Vtpm


class Surroundings(Protocol):
    """What a platform asks of the server it is part of."""

    locality: int  # of the data channel

    @property
    def busy(self) -> bool:
        """Whether a TPM command runs."""

    def request_cancel(self) -> bool:
        """Have the command that runs give up."""

    def take_data_socket(self, sock: socket.socket) -> bool:
        """Serve a data connection that was passed, which becomes ours; False where there is one already."""

    def let_data_socket_go(self) -> None:
        """Close the data connection that was passed."""

    def end(self) -> None:
        """End the process after this turn, cleanly."""


class Platform:
    """Acts on one vTPM for all its control connections."""

    def __init__(self, vtpm: Vtpm, surroundings: Surroundings, rules: Rules) -> None:
        """Act within `rules`."""
        self._vtpm, self._around, self._rules = vtpm, surroundings, rules

    @property
    def running(self) -> bool:
        """Whether the TPM is powered on and well."""
        return self._vtpm.running

    @property
    def busy(self) -> bool:
        """Whether a TPM command runs while this is asked: then it is the stand-in that asks."""
        return self._around.busy

    # power

    def power_on(self, flags: int) -> int:
        """Switch the TPM on, or reset its platform; what is only attached, not switched, is always on."""
        keep_volatile = self._rules.like_swtpm and not flags & InitFlags.DELETE_VOLATILE
        result = self._do(lambda: self._vtpm.power_on(delete_volatile=not keep_volatile), "platform reset")
        if not result and not self._rules.powered:
            self._around.locality = 0
        return result

    def reset(self) -> int:
        """Reset the platform for the manager; one that is switched off stays off, with what was put in."""
        if self._rules.powered and not self.running:
            return Result.SUCCESS if self._vtpm.condition is Condition.OFF else self.power_off()
        return self.power_on(InitFlags.DELETE_VOLATILE)

    def power_off(self) -> int:
        """Switch the TPM off, with what its guest did not save; what was put in and not used is dropped."""
        if self._vtpm.state_blobs is not None:
            self._vtpm.state_blobs.forget()
        return self._do(self._vtpm.power_off, "power off")

    def shutdown(self) -> int:
        """Switch the TPM off; end the process where it is there for this TPM's user alone."""
        result = self.power_off()
        if self._rules.like_swtpm:
            self._around.end()
        return result

    def platform_gone(self) -> None:
        """Switch the TPM off: the connection has ended that its machine was controlled by."""
        if self._rules.powered and not self._rules.like_swtpm:
            self.power_off()
            self._around.locality = 0
            self._around.let_data_socket_go()

    @staticmethod
    def _do(act: Callable[[], None], what: str) -> int:
        try:
            act()
        except LibtpmsError as error:
            note(f"{what} failed: {error}")
            return error.code or Result.FAIL
        except (InstanceError, StorageError) as error:
            note(f"{what} failed: {error}")
            return Result.FAIL
        return Result.SUCCESS

    # beside commands

    def set_locality(self, locality: int) -> int:
        """Set the data channel's locality; a front end that is a plain socket has locality 0 only."""
        if locality > self._rules.highest_locality:
            return Result.BAD_LOCALITY
        self._around.locality = locality
        return Result.SUCCESS

    def cancel(self) -> bool:
        """Have the TPM command that runs give up; returns False where libtpms cannot (TPM 1.2)."""
        return self._around.request_cancel()

    def established(self) -> tuple[int, int]:
        """Return the TPM established bit; clear while the TPM is off, as QEMU cannot read a failure here."""
        if not self.running:
            return (Result.BAD_ORDINAL if self._rules.like_swtpm else Result.SUCCESS), 0
        bits: list[int] = []

        def ask(tpm: Tpm) -> int:
            result, bit = tpm.established()
            bits.append(bit)
            return result

        result = self._vtpm.act(ask)
        return result, bits[0] if bits else 0

    def reset_established(self, locality: int) -> int:
        """Clear the TPM established bit; libtpms takes localities 3 and 4 only."""
        if locality > 4:
            return Result.BAD_LOCALITY
        return self._vtpm.act(lambda tpm: tpm.reset_established(locality))

    def hash_start(self) -> int:
        """Begin a measurement of locality 4."""
        return self._vtpm.act(lambda tpm: tpm.hash_start())

    def hash_data(self, data: bytes) -> int:
        """Go on with it."""
        return self._vtpm.act(lambda tpm: tpm.hash_data(data))

    def hash_end(self) -> int:
        """End it."""
        return self._vtpm.act(lambda tpm: tpm.hash_end())

    def store_volatile(self) -> int:
        """Store the volatile state: the next power on goes on from there."""
        return self._vtpm.store_volatile()

    def config(self) -> int:
        """Return which blobs are encrypted."""
        return self._vtpm.config

    def info(self, flags: int) -> tuple[int, bytes]:
        """Return what libtpms says of itself."""
        try:
            return Result.SUCCESS, self._vtpm.info(flags)
        except LibtpmsError as error:
            return error.code, b""

    def buffer_size(self, wanted: int) -> tuple[int, int, int, int]:
        """Return the command buffer's sizes; they change only while the platform has the TPM switched off."""
        if wanted and (self.running or not self._rules.powered):
            return Result.BAD_ORDINAL, 0, 0, 0
        return Result.SUCCESS, *self._vtpm.set_buffer_size(wanted)

    # state blobs

    def get_blob(self, kind: int, flags: int) -> tuple[int, int, bytes]:
        """Take a state blob out."""
        try:
            BlobKind(kind)
        except ValueError:
            return Result.FAIL, 0, b""
        try:
            return self._vtpm.take_out(kind, flags)
        except (InstanceError, StorageError) as error:
            note(f"no state blob {kind}: {error}")
            return Result.FAIL, 0, b""

    def set_blob(self, kind: int, flags: int, data: bytes) -> int:
        """Put a state blob in."""
        blobs = self._vtpm.state_blobs
        if blobs is None or self.running:
            return Result.BAD_ORDINAL
        if self._vtpm.condition is Condition.FAILED:
            self.power_off()
        try:
            return blobs.put_in(kind, flags, data)
        except (InstanceError, StorageError) as error:
            note(f"state blob {kind} refused: {error}")
            return Result.FAIL

    def lock_storage(self, retries: int) -> int:
        """Take the lock back; a manager never gives it up while the vTPM is attached."""
        return self._vtpm.lock_storage(retries)

    def take_data_descriptor(self, descriptor: int) -> int:
        """Serve a passed socket as data connection."""
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return Result.BAD_PARAMETER
        sock = socket.socket(fileno=descriptor)
        if sock.type != socket.SOCK_STREAM:
            sock.close()
            return Result.BAD_PARAMETER
        return Result.SUCCESS if self._around.take_data_socket(sock) else Result.IO_ERROR
