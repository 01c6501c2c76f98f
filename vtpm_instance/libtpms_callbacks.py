"""The callbacks by which libtpms stores its blobs and asks for its surroundings, and what they keep of errors.

What lives here: the one library of this process, its callbacks, and the rule that an exception in a callback is never
lost. What must not: the calls that run a TPM (`libtpms`).

Source: libtpms 0.9.2 tpm_library.h; behaviour as measured in docs/adr/0002-libtpms-in-its-own-process.md.
"""

import os
from collections.abc import Callable
from typing import Any, Final

from frontend_backend.tpmhdr import MAX_COMMAND, TpmFamily
from vtpm_instance._libtpms import ffi
from vtpm_instance.errors import LibtpmsError

StoreHook = Callable[[str, bytes | None], None]

FAIL: Final = 9  # TPM_FAIL, understood by both families as an answer of a callback
SUCCESS: Final = 0
_READ_AND_EXECUTE: Final = 5  # PROT_READ | PROT_EXEC
_RETRY: Final = 0x800  # TPM_RETRY from a load callback: there is no such blob


def ignore(_name: str, _content: bytes | None) -> None:
    """Keep a change in memory only."""


class Callbacks:
    """What libtpms calls.

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
        self._on_store: StoreHook = ignore
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
            return ffi.callback(types[name], function, error=FAIL, onerror=self._keep_exception)

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
        return SUCCESS

    def _load(self, data: Any, length: Any, _number: int, name: Any) -> int:
        blob = self.blobs.get(ffi.string(name).decode("ascii"))
        if blob is None:
            return _RETRY
        memory = self._libc.malloc(max(len(blob), 1))  # libtpms frees it
        if memory == ffi.NULL:
            return FAIL
        ffi.memmove(memory, blob, len(blob))
        data[0] = ffi.cast("unsigned char *", memory)
        length[0] = len(blob)
        return SUCCESS

    def _store(self, data: Any, length: int, _number: int, name: Any) -> int:
        text = ffi.string(name).decode("ascii")
        content: bytes = ffi.buffer(data, length)[:]
        self.blobs[text] = content
        self._on_store(text, content)
        return SUCCESS

    def _delete(self, _number: int, name: Any, must_exist: int) -> int:
        text = ffi.string(name).decode("ascii")
        if self.blobs.pop(text, None) is None:
            return FAIL if must_exist else SUCCESS
        self._on_store(text, None)
        return SUCCESS

    def _tell_locality(self, locality: Any, _number: int) -> int:
        locality[0] = self._locality
        return SUCCESS

    @staticmethod
    def _tell_presence(presence: Any, _number: int) -> int:
        presence[0] = 0  # no guest is physically present; swtpm answers the same
        return SUCCESS

    # what went wrong

    @staticmethod
    def _check(call: str, code: int) -> None:
        if code:
            raise LibtpmsError(call, code)

    def _raise_kept(self) -> None:
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised
