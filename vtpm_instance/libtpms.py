"""Typed wrapper round libtpms: with its two bases the only modules that touch the C library.

What lives here: the one TPM a process can have (all of libtpms' state is in C globals), and its commands. What must
not: when to save, and what a failure means to the guest; that is `statekeeper` and `power`.

Source: libtpms 0.9.2 tpm_library.h; behaviour as measured in docs/adr/0002-libtpms-in-its-own-process.md.
"""

from frontend_backend.tpmhdr import MAX_COMMAND, TpmFamily
from vtpm_instance._libtpms import ffi
from vtpm_instance.errors import LibtpmsError, LibtpmsMisuseError, StateRefusedError
from vtpm_instance.libtpms_callbacks import FAIL, StoreHook, ignore
from vtpm_instance.libtpms_platform import BLOB_NAMES, PERMANENT, SAVED, VERSIONS, VOLATILE, PlatformCalls
from vtpm_instance.tpm_commands import RC_INITIALIZE, code_of, read_clock

__all__ = ["BLOB_NAMES", "PERMANENT", "SAVED", "VOLATILE", "StoreHook", "Tpm", "the_tpm"]

_buffer = ffi.buffer


class Tpm(PlatformCalls):
    """The TPM of this process; how it stores its state is said in `Callbacks`."""

    drops_volatile = False  # whether a volatile part of a TPM that was not started, or none, is as good as any

    def version(self) -> tuple[int, int, int]:
        """Return libtpms' version as (major, minor, micro)."""
        number = self._c.TPMLIB_GetVersion()
        return number >> 16, number >> 8 & 0xFF, number & 0xFF

    def start(
        self, family: TpmFamily, blobs: dict[str, bytes], on_store: StoreHook = ignore, *, fresh: bool = False
    ) -> None:
        """Power the TPM on (TPMLIB_MainInit, which is `_TPM_Init`); no Startup command is sent.

        `blobs` stays the caller's and is kept current. A new TPM is manufactured only when `fresh` is true;
        then `blobs` must be empty, and otherwise it must hold "permall".

        Raises:
            StateRefusedError: libtpms does not accept the blobs, or the permanent one is missing.
            LibtpmsMisuseError: a TPM runs already, or fresh does not fit the blobs.
            Exception: what `on_store` raised.

        """
        if self._running is not None:
            raise LibtpmsMisuseError("this process has a running TPM already")
        if fresh and blobs:
            raise LibtpmsMisuseError("a fresh TPM was asked for, but there is a stored state")
        if not fresh and PERMANENT not in blobs:
            raise StateRefusedError(family.value, FAIL, "it holds no permanent state")
        if unknown := blobs.keys() - BLOB_NAMES:
            raise StateRefusedError(family.value, FAIL, f"it holds unknown blobs {sorted(unknown)}")
        self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(VERSIONS[family]))
        self.blobs, self._on_store = blobs, on_store
        self._set_locality(0)
        code = self._c.TPMLIB_MainInit()
        if code or self._raised is not None:
            self._c.TPMLIB_Terminate()
            self._raise_kept()
            raise StateRefusedError(family.value, code, "it cannot be read")
        self._running = family
        self.starts += 1
        if VOLATILE in blobs and family is TpmFamily.TPM_2_0 and not self.drops_volatile:
            self._check_resumed()

    def _check_resumed(self) -> None:
        # libtpms drops a volatile state whose hash it cannot read and powers on as if there were none [measured].
        code = code_of(self.process(read_clock()))
        if code == RC_INITIALIZE:
            self.terminate()
            raise StateRefusedError(TpmFamily.TPM_2_0.value, code, "its volatile part cannot be read")

    def process(self, command: bytes, locality: int = 0) -> bytes:
        """Execute one TPM command of at most 4096 bytes and return its response, whatever it says.

        Raises:
            LibtpmsMisuseError: no TPM runs, or the command is longer than the buffer.
            LibtpmsError: libtpms gave no response.
            Exception: what `on_store` raised; the TPM is then in failure mode and its response is dropped.

        """
        size = len(command)
        if size > MAX_COMMAND:
            raise LibtpmsMisuseError(f"a command of {size} bytes; libtpms takes {MAX_COMMAND}")
        self.commands[0:size] = command
        return self.process_placed(size, locality)

    def process_placed(self, size: int, locality: int = 0) -> bytes:
        """Execute the command that lies in the first `size` bytes of `commands`; the rest is as in `process`.

        Who receives a command straight into `commands` spares a copy.
        """
        if self._running is None:
            raise LibtpmsMisuseError("no TPM runs in this process")
        if locality != self._locality:
            self._set_locality(locality)
        code = self._process(self._response, self._response_size, self._response_room, self._command, size)
        if self._raised is not None:
            self._raise_kept()
        if code:
            raise LibtpmsError("Process", code)
        response: bytes = _buffer(self._response[0], self._response_size[0])[:]
        return response

    def terminate(self) -> None:
        """Power the TPM off without saving anything. May be repeated."""
        if self._running is not None:
            self._c.TPMLIB_Terminate()
            self._running = None

    def volatile(self) -> bytes:
        """Return the running TPM's volatile state (TPMLIB_VolatileAll_Store), about 9 KB for a TPM 2.0.

        Whoever restores it must do so once only and stir fresh entropy in: it holds the random generator.

        Raises:
            LibtpmsMisuseError: no TPM runs.
            LibtpmsError: libtpms refuses.

        """
        if self._running is None:
            raise LibtpmsMisuseError("no TPM runs in this process")
        data, length = ffi.new("unsigned char **"), ffi.new("uint32_t *")
        self._check("VolatileAll_Store", self._c.TPMLIB_VolatileAll_Store(data, length))
        try:
            content: bytes = ffi.buffer(data[0], length[0])[:]
        finally:
            self._libc.free(data[0])
        return content

    @property
    def profiles(self) -> bool:
        """Whether this libtpms has profiles: older ones lack the symbol that we declare."""
        return self.version() >= (0, 10, 0)

    def set_profile(self, profile: str) -> None:
        """Have a TPM 2.0 that is manufactured next be of a profile, given as JSON. Only where there are `profiles`.

        Raises:
            LibtpmsError: libtpms refuses it.

        """
        self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(VERSIONS[TpmFamily.TPM_2_0]))
        self._check("SetProfile", self._c.TPMLIB_SetProfile(profile.encode()))

    def speak_up(self, level: int, prefix: str) -> None:
        """Have libtpms tell what it does: whole commands and answers, secrets included."""
        self._c.TPMLIB_SetDebugLevel(level)
        self._c.TPMLIB_SetDebugPrefix(prefix.encode())

    def write_messages_to(self, descriptor: int) -> None:
        """Have libtpms write its messages to `descriptor`, standard error being its default.

        When a command ends in failure mode libtpms writes the whole command there, secrets included.
        """
        self._c.TPMLIB_SetDebugFD(descriptor)

    def cancel(self) -> int:
        """Ask the command that runs on another thread to give up; returns libtpms' code (1.2: 9, unsupported)."""
        code: int = self._c.TPMLIB_CancelCommand()
        return code


_the_tpm: list[Tpm] = []


def the_tpm() -> Tpm:
    """Return the one Tpm of this process; forked children share what the parent prepared.

    Raises:
        OSError: libtpms is not installed.

    """
    if not _the_tpm:
        _the_tpm.append(Tpm())
    return _the_tpm[0]
