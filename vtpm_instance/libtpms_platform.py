"""What a platform asks of libtpms beside commands: D-RTM measurements, the established bit, information, sizes.

Source: libtpms 0.9.2 tpm_library.h and tpm_tis.h.
"""

from enum import IntEnum
from typing import Final

from frontend_backend.tpmhdr import TpmFamily
from vtpm_instance._libtpms import ffi
from vtpm_instance.errors import LibtpmsError, LibtpmsMisuseError
from vtpm_instance.libtpms_callbacks import FAIL, SUCCESS, Callbacks

PERMANENT: Final = "permall"  # the three names libtpms gives its blobs (tpm_nvfilename.h)
VOLATILE: Final = "volatilestate"
SAVED: Final = "savestate"
BLOB_NAMES: Final = frozenset({PERMANENT, VOLATILE, SAVED})
_STATES: Final = {PERMANENT: 1, VOLATILE: 2, SAVED: 4}  # enum TPMLIB_StateType
_INFO_FLAGS: Final = 0x7FFFFFFF  # what an enumeration holds: a control command has 64 bits, libtpms knows 8


class _Version(IntEnum):
    """TPMLIB_TPMVersion."""

    TPM_1_2 = 0
    TPM_2_0 = 1


VERSIONS: Final = {TpmFamily.TPM_1_2: _Version.TPM_1_2, TpmFamily.TPM_2_0: _Version.TPM_2_0}


class PlatformCalls(Callbacks):
    """Calls of a platform; results are libtpms' codes."""

    @property
    def running(self) -> TpmFamily | None:
        """The family of the TPM that runs in this process, or None."""
        return self._running

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
            self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(VERSIONS[family]))
        text = self._c.TPMLIB_GetInfo(flags & _INFO_FLAGS)
        if text == ffi.NULL:
            raise LibtpmsError("GetInfo", FAIL)
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
        other = next(version for known, version in VERSIONS.items() if known is not family)
        self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(VERSIONS[family]))
        try:
            for name, kind in _STATES.items():  # libtpms wants the permanent one first
                if name in blobs and (code := self._c.TPMLIB_SetState(kind, blobs[name], len(blobs[name]))):
                    return int(code)
            return SUCCESS
        finally:
            # Another version and back: the one way to make libtpms forget what it was given.
            self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(other))
            self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(VERSIONS[family]))

    def buffer_size(self, family: TpmFamily, wanted: int = 0) -> tuple[int, int, int]:
        """Return (size, smallest, largest) of the command buffer in bytes; `wanted` above 0 sets it.

        Raises:
            LibtpmsMisuseError: a TPM runs and `wanted` is not 0 (libtpms would change it under the guest).
            LibtpmsError: libtpms refuses.

        """
        if self._running is None:
            self._check("ChooseTPMVersion", self._c.TPMLIB_ChooseTPMVersion(VERSIONS[family]))
        elif wanted:
            raise LibtpmsMisuseError("the buffer size cannot change while the TPM runs")
        smallest, largest = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        size = self._c.TPMLIB_SetBufferSize(wanted, smallest, largest)
        return size, smallest[0], largest[0]
