"""The storage root key: template, provisioning, and the check that it is the pinned one.

A salted session protects nothing if somebody between the TPM and us supplied the public key that it is salted with. So
the Name is computed from the very public area the TSS is going to use, and compared with the pinned one.
"""

import struct
from typing import Any, Final

from tpm2_pytss import ESYS_TR, TPM2_ALG, TPM2B_PUBLIC, TPMA_OBJECT

from manager.hwtpm_errors import SrkChanged, SrkUnusable, TpmCleared, TpmError
from manager.hwtpm_link import TpmLink, flushed
from manager.hwtpm_rc import RC_HANDLE, meaning
from manager.hwtpm_templates import SRK_ATTRIBUTES, srk_template

# TCG TPM v2.0 Provisioning Guidance, 7.5.1: the handle of the storage primary key.
SRK_HANDLE: Final = 0x81000001
_PERSISTENT_RANGE: Final = 0x81000000


class Srk:
    """The SRK of one link: pinned by Name, opened again after the link was made anew."""

    def __init__(self, link: TpmLink) -> None:
        self._link = link
        self._pinned: bytes | None = None
        self._handle: Any = None
        self._connection = 0

    @property
    def pinned(self) -> bytes | None:
        """Return the pinned Name (34 bytes), or None before provision_srk or open_srk."""
        return self._pinned

    def provision(self) -> bytes:
        """Persist an SRK at 0x81000001 if none is there; pin the one there. Returns its Name, 34 bytes.

        Raises SrkUnusable: a key is there that is no storage key we can use. OwnerAuthWanted.
        """
        with self._link.operation("provision the storage root key") as esapi:
            if SRK_HANDLE not in self._link.handles(esapi, _PERSISTENT_RANGE):
                self._create(esapi)
            self._open(esapi, None)
            assert self._pinned is not None, "_open pins what it accepts"
            return self._pinned

    def _create(self, esapi: Any) -> None:
        with self._link.session(esapi, ESYS_TR.NONE) as owner:
            primary, *_ = esapi.create_primary(None, srk_template(), ESYS_TR.OWNER, session1=owner)
            with flushed(esapi, primary):
                esapi.tr_close(esapi.evict_control(ESYS_TR.OWNER, primary, SRK_HANDLE, session1=owner))

    def pin(self, name: bytes) -> None:
        """Open the SRK and check that it has this Name. Raises TpmCleared, SrkChanged, SrkUnusable."""
        with self._link.operation("open the storage root key") as esapi:
            self._open(esapi, name)

    def handle(self, esapi: Any) -> Any:
        """Return the ESYS_TR of the pinned SRK, inside an operation. Raises TpmCleared, SrkChanged."""
        if self._pinned is None:
            raise RuntimeError("provision_srk or open_srk must come first")
        if self._handle is None or self._connection != self._link.connections:
            self._open(esapi, self._pinned)
        return self._handle

    def recheck(self, esapi: Any, otherwise: TpmError) -> TpmError:
        """Inside an operation, after the TPM refused an object: TpmCleared or SrkChanged if that is why."""
        assert self._pinned is not None, "an object was loaded under it"
        try:
            self._open(esapi, self._pinned)
        except (TpmCleared, SrkChanged) as reason:
            return reason
        return otherwise

    def _open(self, esapi: Any, pinned: bytes | None) -> None:
        # While a reference is held the TSS answers from its own copy, not from the TPM.
        if self._handle is not None and self._connection == self._link.connections:
            esapi.tr_close(self._handle)
        self._handle = None
        with meaning({RC_HANDLE: lambda: TpmCleared(SRK_HANDLE, pinned or b"")}):
            handle = esapi.tr_from_tpmpublic(SRK_HANDLE)
        try:
            public = _public_in_use(esapi, handle)
            found = bytes(public.get_name())
            if pinned not in {None, found}:
                raise SrkChanged(SRK_HANDLE, pinned or b"", found)
            _check_template(public)
        except TpmError:
            esapi.tr_close(handle)
            raise
        self._pinned, self._handle, self._connection = found, handle, self._link.connections


def _public_in_use(esapi: Any, handle: Any) -> Any:
    """Return the TPM2B_PUBLIC inside the TSS's own resource: what sessions are salted with.

    Esys_TR_Serialize gives u32 handle, TPM2B_NAME, u32 resource type, TPM2B_PUBLIC (tpm2-tss esys_mu.c).
    Raises SrkUnusable if the Name the TPM claimed does not belong to that public area.
    """
    data = bytes(esapi.tr_serialize(handle))
    (name_size,) = struct.unpack_from(">H", data, 4)
    claimed = data[6 : 6 + name_size]
    public, used = TPM2B_PUBLIC.unmarshal(data[6 + name_size + 4 :])
    if used != len(data) - name_size - 10 or bytes(public.get_name()) != claimed:
        raise SrkUnusable(SRK_HANDLE, "its Name does not belong to its public area")
    return public


def _check_template(public: Any) -> None:
    """Raise SrkUnusable unless it is a storage key made inside this TPM, usable with an empty password."""
    area = public.publicArea
    wanted = int(SRK_ATTRIBUTES)
    if int(area.nameAlg) != int(TPM2_ALG.SHA256):
        raise SrkUnusable(SRK_HANDLE, "its name algorithm is not SHA-256")
    attributes = int(area.objectAttributes)
    if attributes & wanted != wanted:
        raise SrkUnusable(SRK_HANDLE, f"it has attributes 0x{attributes:08x}, needed are 0x{wanted:08x}")
    if attributes & int(TPMA_OBJECT.SIGN_ENCRYPT):
        raise SrkUnusable(SRK_HANDLE, "it is a signing key")
    match int(area.type):
        case int(TPM2_ALG.ECC):
            symmetric = area.parameters.eccDetail.symmetric
        case int(TPM2_ALG.RSA):
            symmetric = area.parameters.rsaDetail.symmetric
        case kind:
            raise SrkUnusable(SRK_HANDLE, f"its type is 0x{kind:04x}, neither ECC nor RSA")
    if int(symmetric.algorithm) != int(TPM2_ALG.AES):
        raise SrkUnusable(SRK_HANDLE, "it does not protect its children with AES")
