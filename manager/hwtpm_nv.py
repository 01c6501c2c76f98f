"""The durable anchor: an NV index that only we can write, at locality 2, and whose reading cannot be faked.

Write policy: PolicyLocality(2) + PolicyAuthValue. Read: by the authorisation value in a salted HMAC session, so that
a value on the bus can neither be seen nor replaced. The Name is pinned. Source: reference section 3, scheme H.
"""

from typing import Any, Final

from tpm2_pytss import (
    TPM2_ALG,
    TPM2_NT,
    TPM2B_NV_PUBLIC,
    TPMA_LOCALITY,
    TPMA_NV,
    TPMS_NV_PUBLIC,
)

from manager import hwtpm_rc as rc
from manager.hwtpm_errors import AnchorDenied, AnchorExists, AnchorMissing, TpmError, TpmFull, WrongLocality
from manager.hwtpm_link import TpmLink
from manager.hwtpm_records import AnchorInfo
from manager.hwtpm_srk import Srk
from manager.policy_digests import anchor_write_policy, nv_index_name

# Registry of reserved TPM 2.0 handles: 0x01800000..0x01BFFFFF are the owner's to use.
DEFAULT_INDEX: Final = 0x01800100
LAST_INDEX: Final = 0x018001FF
ANCHOR_BYTES: Final = 32
AUTH_BYTES: Final = 32
_NV_RANGE: Final = 0x01000000
# Part 2, 13.4 TPMA_NV. Ordinary index; no AUTHWRITE, OWNERWRITE or OWNERREAD.
_ATTRIBUTES: Final = int(TPMA_NV.POLICYWRITE) | int(TPMA_NV.AUTHREAD) | int(TPMA_NV.NO_DA) | int(TPM2_NT.ORDINARY) << 4
_WRITTEN: Final = int(TPMA_NV.WRITTEN)


class Anchors:
    """Durable anchors of one TPM, through one link and one SRK."""

    def __init__(self, link: TpmLink, srk: Srk) -> None:
        self._link = link
        self._srk = srk

    def free_index(self) -> int:
        """Return the first unused index from 0x01800100 to 0x018001ff. Raises TpmFull if there is none."""
        with self._link.operation("look for a free NV index") as esapi:
            used = set(self._link.handles(esapi, _NV_RANGE))
        free = next((index for index in range(DEFAULT_INDEX, LAST_INDEX + 1) if index not in used), None)
        if free is None:
            raise TpmFull("look for a free NV index", "an anchor from 0x01800100 to 0x018001ff")
        return free

    def plan(self, index: int) -> AnchorInfo:
        """Return the record of the anchor that `define` would make of this index."""
        locality = self._link.locality or None
        return AnchorInfo(index, _name(index, locality, written=True), locality)

    def define(self, index: int, auth: bytes) -> AnchorInfo:
        """Define an index of 32 bytes with `auth` (32 random bytes); unwritten until the first `write`.

        Raises AnchorExists, OwnerAuthWanted, TpmFull. The owner's password and `auth` go encrypted.
        """
        if len(auth) != AUTH_BYTES:
            raise ValueError(f"an anchor has an authorisation value of {AUTH_BYTES} bytes, not {len(auth)}")
        info = self.plan(index)
        public = TPM2B_NV_PUBLIC(
            TPMS_NV_PUBLIC(
                nvIndex=index,
                nameAlg=TPM2_ALG.SHA256,
                attributes=TPMA_NV(_ATTRIBUTES),
                authPolicy=anchor_write_policy(info.locality),
                dataSize=ANCHOR_BYTES,
            )
        )
        with (
            self._link.operation(f"define NV index 0x{index:08x}") as esapi,
            self._link.session(esapi, self._srk.handle(esapi)) as owner,
            rc.meaning({rc.RC_NV_DEFINED: lambda: AnchorExists(index)}),
        ):
            esapi.tr_close(esapi.nv_define_space(auth, public, session1=owner))
        return info

    def undefine(self, info: AnchorInfo) -> None:
        """Remove an index we defined (to rotate `auth`, or to give the TPM back). Raises AnchorMissing."""
        with self._link.operation(f"remove NV index 0x{info.index:08x}") as esapi:
            handle = self._open(esapi, info, unwritten_too=True)
            with self._link.session(esapi, self._srk.handle(esapi)) as owner:
                esapi.nv_undefine_space(handle, session1=owner)

    def read(self, info: AnchorInfo, auth: bytes) -> bytes:
        """Return the anchored digest, 32 bytes.

        Raises AnchorMissing: no such index, never written, or not the one defined. AnchorDenied: other `auth`.
        """
        with self._link.operation(f"read NV index 0x{info.index:08x}") as esapi:
            handle = self._open(esapi, info, unwritten_too=False)
            with _closing(esapi, handle):
                esapi.tr_set_auth(handle, auth)
                with (
                    self._link.session(esapi, self._srk.handle(esapi)) as session,
                    rc.meaning(_meanings(info, "read it")),
                ):
                    return bytes(esapi.nv_read(handle, ANCHOR_BYTES, 0, handle, session1=session))

    def write(self, info: AnchorInfo, auth: bytes, digest: bytes, *, first: bool = False) -> None:
        """Write the anchored digest, 32 bytes; durable in the TPM when this returns.

        first: allow an index that was defined but never written; otherwise that is AnchorMissing.
        Raises AnchorMissing, AnchorDenied, WrongLocality.
        """
        if len(digest) != ANCHOR_BYTES:
            raise ValueError(f"an anchor holds {ANCHOR_BYTES} bytes, not {len(digest)}")
        with self._link.operation(f"write NV index 0x{info.index:08x}") as esapi:
            handle = self._open(esapi, info, unwritten_too=first)
            with _closing(esapi, handle):
                esapi.tr_set_auth(handle, auth)
                with (
                    self._link.session(esapi, self._srk.handle(esapi), policy=True) as session,
                    rc.meaning(_meanings(info, "write it")),
                ):
                    if info.locality is not None:
                        esapi.policy_locality(session, TPMA_LOCALITY.TWO)
                    esapi.policy_auth_value(session)
                    esapi.nv_write(handle, digest, 0, handle, session1=session)

    def _open(self, esapi: Any, info: AnchorInfo, *, unwritten_too: bool) -> Any:
        """Return the ESYS_TR of the index if the Name the TSS will use is the pinned one. Raises AnchorMissing."""
        gone = {rc.RC_HANDLE: lambda: AnchorMissing(info.index, "it does not exist")}
        with rc.meaning(gone):
            handle = esapi.tr_from_tpmpublic(info.index)
        name = bytes(esapi.tr_get_name(handle))
        unwritten = name == _name(info.index, info.locality, written=False)
        if name == info.name or (unwritten and unwritten_too):
            return handle
        esapi.tr_close(handle)
        why = "it was defined anew and never written" if unwritten else f"its Name is {name.hex()}"
        raise AnchorMissing(info.index, why)


class _closing:  # noqa: N801 - a context manager named as one reads it
    """Forget the TSS's resource for an NV index; the index itself stays."""

    def __init__(self, esapi: Any, handle: Any) -> None:
        self._esapi = esapi
        self._handle = handle

    def __enter__(self) -> None:
        """Nothing to do: the handle exists."""

    def __exit__(self, *exc: object) -> None:
        self._esapi.tr_close(self._handle)


def _name(index: int, locality: int | None, *, written: bool) -> bytes:
    attributes = _ATTRIBUTES | (_WRITTEN if written else 0)
    return nv_index_name(index, attributes, anchor_write_policy(locality), ANCHOR_BYTES)


def _meanings(info: AnchorInfo, doing: str) -> rc.Special:
    def denied() -> TpmError:
        return AnchorDenied(info.index, doing)

    return {
        rc.RC_AUTH_FAIL: denied,
        rc.RC_BAD_AUTH: denied,
        rc.RC_NV_AUTHORIZATION: denied,
        rc.RC_POLICY_FAIL: denied,
        rc.RC_NV_UNINITIALIZED: lambda: AnchorMissing(info.index, "it was never written"),
        rc.RC_LOCALITY: lambda: WrongLocality(2, f"it refused to {doing}, the anchor wants locality 2"),
    }
