"""Typed wrapper round libtpms: the only module that touches the C library.

What lives here: the one TPM a process can have (all of libtpms' state is in C globals), its NV callbacks and
the rule that an exception in a callback is never lost. What must not: when to save, and what a failure means
to the guest; that is `statekeeper` and `vtpm`.

Source: libtpms 0.9.2 tpm_library.h; behaviour as measured in docs/adr/0002-libtpms-in-its-own-process.md.
"""

import os
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final

from frontend_backend.tpmhdr import MAX_COMMAND, TpmFamily
from vtpm_instance._libtpms import ffi
from vtpm_instance.errors import LibtpmsError, LibtpmsMisuseError, StateRefusedError
from vtpm_instance.tpm_commands import RC_INITIALIZE, code_of, read_clock

StoreHook = Callable[[str, bytes | None], None]

PERMANENT: Final = "permall"  # the three names libtpms gives its blobs (tpm_nvfilename.h)
VOLATILE: Final = "volatilestate"
SAVED: Final = "savestate"
BLOB_NAMES: Final = frozenset({PERMANENT, VOLATILE, SAVED})

_STATES: Final = {PERMANENT: 1, VOLATILE: 2, SAVED: 4}  # enum TPMLIB_StateType

_buffer: Final = ffi.buffer
_READ_AND_EXECUTE: Final = 5  # PROT_READ | PROT_EXEC
_SUCCESS: Final = 0
_FAIL: Final = 9  # TPM_FAIL, understood by both families as an answer of a callback
_RETRY: Final = 0x800  # TPM_RETRY from a load callback: there is no such blob


class _Version(IntEnum):
    """TPMLIB_TPMVersion."""

    TPM_1_2 = 0
    TPM_2_0 = 1


_VERSIONS: Final = {TpmFamily.TPM_1_2: _Version.TPM_1_2, TpmFamily.TPM_2_0: _Version.TPM_2_0}


def _ignore(_name: str, _content: bytes | None) -> None:
    """Keep a change in memory only."""


class Tpm:
    """The TPM of this process.

    `blobs` is what libtpms has stored, by name, in the caller's own dict: it changes before `on_store` is told.
    `on_store(name, content)` is called inside `process` and `start` for each stored blob, with None for a
    deleted one; it returns when the change may be answered for, or raises, and then libtpms is told TPM_FAIL
    and the exception comes out of the call that caused it.
    """

    def __init__(self, library: str = "libtpms.so.0") -> None:
        """Load the library and register the callbacks; makes no TPM yet.

        Raises:
            OSError: the library is not installed.

        """
        self._c: Any = ffi.dlopen(library)
        self._libc: Any = ffi.dlopen(None)
        self.blobs: dict[str, bytes] = {}
        self._on_store: StoreHook = _ignore
        self._locality = 0
        self._running: TpmFamily | None = None
        self.starts = 0  # how often it was powered on
        self._raised: BaseException | None = None
        self._response = ffi.new("unsigned char **")
        self._response_size = ffi.new("uint32_t *")
        self._response_room = ffi.new("uint32_t *")
        self._command = ffi.new("unsigned char[]", MAX_COMMAND)
        self.commands: Any = ffi.buffer(self._command)  # writable; where `process_placed` expects its command
        self._process = self._c.TPMLIB_Process
        self._register()

    def _register(self) -> None:
        # The type comes from the struct: the out-of-line parser does not know the form with const.
        types = {name: field.type for name, field in ffi.typeof("struct libtpms_callbacks").fields}

        def closure(name: str, function: Callable[..., int]) -> Any:
            return ffi.callback(types[name], function, error=_FAIL, onerror=self._keep_exception)

        table: dict[str, Callable[..., int]] = {
            "tpm_nvram_init": self._nothing_to_do,
            "tpm_nvram_loaddata": self._load,
            "tpm_nvram_storedata": self._store,
            "tpm_nvram_deletename": self._delete,
            "tpm_io_init": self._nothing_to_do,
            "tpm_io_getlocality": self._tell_locality,
            "tpm_io_getphysicalpresence": self._tell_presence,
        }
        self._closures = {name: closure(name, function) for name, function in table.items()}
        self._at_any_locality = self._callbacks(self._closures)
        # Without the callback libtpms takes locality 0; asking Python for it would be a third of a cheap command.
        at_zero = {name: pointer for name, pointer in self._closures.items() if name != "tpm_io_getlocality"}
        self._at_locality_zero = self._callbacks(at_zero)
        self._check("RegisterCallbacks", self._c.TPMLIB_RegisterCallbacks(self._at_locality_zero))

    def seal_closures(self) -> None:
        """Take the right to write from the pages with the callbacks' machine code, which cffi leaves writable.

        No callback can be made any more.

        Raises:
            OSError: the kernel refuses.

        """
        page = os.sysconf("SC_PAGESIZE")
        for start in {int(ffi.cast("uintptr_t", pointer)) // page * page for pointer in self._closures.values()}:
            if self._libc.mprotect(ffi.cast("void *", start), page, _READ_AND_EXECUTE):
                raise OSError(ffi.errno, "the callbacks' page cannot be protected")

    @staticmethod
    def _callbacks(closures: dict[str, Any]) -> Any:
        callbacks = ffi.new("struct libtpms_callbacks *")
        callbacks.sizeOfStruct = ffi.sizeof("struct libtpms_callbacks")
        for name, pointer in closures.items():
            setattr(callbacks, name, pointer)
        return callbacks

    def _set_locality(self, locality: int) -> None:
        table = self._at_any_locality if locality else self._at_locality_zero
        self._check("RegisterCallbacks", self._c.TPMLIB_RegisterCallbacks(table))
        self._locality = locality

    # callbacks: called by libtpms, on this thread, inside MainInit and Process

    def _keep_exception(self, _type: object, error: BaseException, _traceback: object) -> None:
        if self._raised is None:
            self._raised = error

    @staticmethod
    def _nothing_to_do() -> int:
        return _SUCCESS

    def _load(self, data: Any, length: Any, _number: int, name: Any) -> int:
        blob = self.blobs.get(ffi.string(name).decode("ascii"))
        if blob is None:
            return _RETRY
        memory = self._libc.malloc(max(len(blob), 1))  # libtpms frees it
        if memory == ffi.NULL:
            return _FAIL
        ffi.memmove(memory, blob, len(blob))
        data[0] = ffi.cast("unsigned char *", memory)
        length[0] = len(blob)
        return _SUCCESS

    def _store(self, data: Any, length: int, _number: int, name: Any) -> int:
        text = ffi.string(name).decode("ascii")
        content: bytes = ffi.buffer(data, length)[:]
        self.blobs[text] = content
        self._on_store(text, content)
        return _SUCCESS

    def _delete(self, _number: int, name: Any, must_exist: int) -> int:
        text = ffi.string(name).decode("ascii")
        if self.blobs.pop(text, None) is None:
            return _FAIL if must_exist else _SUCCESS
        self._on_store(text, None)
        return _SUCCESS

    def _tell_locality(self, locality: Any, _number: int) -> int:
        locality[0] = self._locality
        return _SUCCESS

    @staticmethod
    def _tell_presence(presence: Any, _number: int) -> int:
        presence[0] = 0  # no guest is physically present; swtpm answers the same
        return _SUCCESS

    # calls

    @staticmethod
    def _check(call: str, code: int) -> None:
        if code:
            raise LibtpmsError(call, code)

    def _raise_kept(self) -> None:
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised

    @property
    def running(self) -> TpmFamily | None:
        """The family of the TPM that runs in this process, or None."""
        return self._running

    def version(self) -> tuple[int, int, int]:
        """Return libtpms' version as (major, minor, micro)."""
        number = self._c.TPMLIB_GetVersion()
        return number >> 16, number >> 8 & 0xFF, number & 0xFF

    def start(
        self, family: TpmFamily, blobs: dict[str, bytes], on_store: StoreHook = _ignore, *, fresh: bool = False
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
            raise StateRefusedError(family.value, _FAIL, "it holds no permanent state")
        if unknown := blobs.keys() - BLOB_NAMES:
            raise StateRefusedError(family.value, _FAIL, f"it holds unknown blobs {sorted(unknown)}")
        self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(_VERSIONS[family]))
        self.blobs, self._on_store = blobs, on_store
        self._set_locality(0)
        code = self._c.TPMLIB_MainInit()
        if code or self._raised is not None:
            self._c.TPMLIB_Terminate()
            self._raise_kept()
            raise StateRefusedError(family.value, code, "it cannot be read")
        self._running = family
        self.starts += 1
        if VOLATILE in blobs and family is TpmFamily.TPM_2_0:
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

    def buffer_size(self, family: TpmFamily, wanted: int = 0) -> tuple[int, int, int]:
        """Return (size, smallest, largest) of the command buffer in bytes; `wanted` above 0 sets it.

        Raises:
            LibtpmsMisuseError: a TPM runs and `wanted` is not 0 (libtpms would change it under the guest).
            LibtpmsError: libtpms refuses.

        """
        if self._running is None:
            self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(_VERSIONS[family]))
        elif wanted:
            raise LibtpmsMisuseError("the buffer size cannot change while the TPM runs")
        smallest, largest = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        size = self._c.TPMLIB_SetBufferSize(wanted, smallest, largest)
        return size, smallest[0], largest[0]

    # what a platform does beside commands; results are libtpms' codes

    def _answered(self, code: int) -> int:
        self._raise_kept()
        return code

    def hash_start(self) -> int:
        """Begin a root of trust's measurement: TPM_IO_Hash_Start."""
        return self._answered(self._c.TPM_IO_Hash_Start())

    def hash_data(self, data: bytes) -> int:
        """Go on with it: TPM_IO_Hash_Data."""
        return self._answered(self._c.TPM_IO_Hash_Data(data, len(data)))

    def hash_end(self) -> int:
        """End it, and extend the PCR: TPM_IO_Hash_End."""
        return self._answered(self._c.TPM_IO_Hash_End())

    def established(self) -> tuple[int, int]:
        """Return (code, TPM established bit): TPM_IO_TpmEstablished_Get."""
        bit = ffi.new("TPM_BOOL *")
        code = self._answered(self._c.TPM_IO_TpmEstablished_Get(bit))
        return code, bit[0]

    def reset_established(self, locality: int) -> int:
        """Clear the TPM established bit at a locality: TPM_IO_TpmEstablished_Reset."""
        if locality != self._locality:
            self._set_locality(locality)
        return self._answered(self._c.TPM_IO_TpmEstablished_Reset())

    def info(self, family: TpmFamily, flags: int) -> bytes:
        """Return libtpms' JSON text of what `flags` ask for, with its trailing zero byte: TPMLIB_GetInfo.

        Raises:
            LibtpmsError: it has none.

        """
        if self._running is None:
            self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(_VERSIONS[family]))
        text = self._c.TPMLIB_GetInfo(flags)
        if text == ffi.NULL:
            raise LibtpmsError("GetInfo", _FAIL)
        try:
            return bytes(ffi.string(text)) + b"\0"
        finally:
            self._libc.free(text)

    def judge(self, family: TpmFamily, blobs: dict[str, bytes]) -> int:
        """Return libtpms' code for a set of state blobs, 0 if it would start on them; nothing of it is kept.

        Raises:
            LibtpmsMisuseError: a TPM runs.

        """
        if self._running is not None:
            raise LibtpmsMisuseError("this process has a running TPM")
        other = next(version for known, version in _VERSIONS.items() if known is not family)
        self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(_VERSIONS[family]))
        try:
            for name, kind in _STATES.items():  # libtpms wants the permanent one first
                if name in blobs and (code := self._c.TPMLIB_SetState(kind, blobs[name], len(blobs[name]))):
                    return int(code)
            return _SUCCESS
        finally:
            # Another version and back: the one way to make libtpms forget what it was given.
            self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(other))
            self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(_VERSIONS[family]))

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
