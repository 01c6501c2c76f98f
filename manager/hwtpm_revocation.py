"""The revocation index: one NV index of 64 sequences, which policies compare approvals with. It only ever rises.

Write policy: PolicyLocality(2) + PolicySigned by a key derived from the store key. Read: with the empty password, as
the platform object has to open before any secret is known; nothing in it is secret. Source: adr 9; Part 3, 23.9.
"""

from typing import Any, Final

from tpm2_pytss import TPM2_ALG, TPM2_NT, TPM2B_NV_PUBLIC, TPMA_LOCALITY, TPMA_NV, TPMS_NV_PUBLIC

from manager import hwtpm_rc as rc
from manager.approval import SLOT_BYTES, SLOTS
from manager.approval_errors import RevocationDenied, RevocationMissing
from manager.hwtpm_errors import TpmError, TpmFull, WrongLocality
from manager.hwtpm_link import TpmLink
from manager.hwtpm_records import AnchorInfo
from manager.hwtpm_signed import policy_signed
from manager.hwtpm_srk import Srk
from manager.policy_digests import nv_index_name, p256_key_name, revocation_write_policy
from manager.revocation_writer import RevocationWriter

# Beside the anchors' range, in the owner's (registry of reserved TPM 2.0 handles).
FIRST_INDEX: Final = 0x01800200
LAST_INDEX: Final = 0x018002FF
INDEX_BYTES: Final = SLOTS * SLOT_BYTES
_NV_RANGE: Final = 0x01000000
# Part 2, 13.4 TPMA_NV. No AUTHWRITE, OWNERWRITE, PPWRITE; an ordinary index, as chips have eight counters at most.
_ATTRIBUTES: Final = int(TPMA_NV.POLICYWRITE) | int(TPMA_NV.AUTHREAD) | int(TPMA_NV.NO_DA) | int(TPM2_NT.ORDINARY) << 4
_WRITTEN: Final = int(TPMA_NV.WRITTEN)


class Revocations:
    """Revocation indices of one TPM, through one link and one SRK. `AnchorInfo` is the pinned public part of one."""

    def __init__(self, link: TpmLink, srk: Srk) -> None:
        self._link = link
        self._srk = srk

    def plan(self, index: int, writer_point: bytes) -> AnchorInfo:
        """Return the index's Name as `ensure` makes it, once written."""
        locality = self._link.locality or None
        return AnchorInfo(index, _name(index, locality, writer_point, written=True), locality)

    def place(self, writer_point: bytes, prefer: int = FIRST_INDEX) -> AnchorInfo:
        """Return the index that is this writer's already, or a free one. Raises TpmFull if there is neither.

        prefer: the one to take if it is free; approvals name the index by its number and Name.
        """
        with self._link.operation("look for the revocation index") as esapi:
            used = set(self._link.handles(esapi, _NV_RANGE))
            # the preferred one first: anybody may define another with our policy, which is public, beside it
            for index in sorted(used & set(range(FIRST_INDEX, LAST_INDEX + 1)), key=lambda at: (at != prefer, at)):
                handle = esapi.tr_from_tpmpublic(index)
                name = bytes(esapi.tr_get_name(handle))
                esapi.tr_close(handle)
                if name in self._names(index, writer_point):
                    return self.plan(index, writer_point)
        free = next((index for index in (prefer, *range(FIRST_INDEX, LAST_INDEX + 1)) if index not in used), None)
        if free is None:
            raise TpmFull("define the revocation index", "an NV index from 0x01800200 to 0x018002ff")
        return self.plan(free, writer_point)

    def _names(self, index: int, writer_point: bytes) -> tuple[bytes, bytes]:
        locality = self._link.locality or None
        return _name(index, locality, writer_point, written=True), _name(index, locality, writer_point, written=False)

    def ensure(self, info: AnchorInfo, writer: RevocationWriter, least: dict[int, int]) -> None:
        """Define the index if it is not there, write it if it never was; raise slots to `least` (slot -> sequence).

        What an interrupted call left is completed. Raises RevocationMissing: another one has this number.
        OwnerAuthWanted, TpmFull, WrongLocality, RevocationDenied.
        """
        with self._link.operation(f"define NV index 0x{info.index:08x}") as esapi:
            if info.index not in self._link.handles(esapi, _NV_RANGE):
                self._define(esapi, info, writer.point)
            handle, written = self._open(esapi, info, writer.point)
            try:
                if not written:
                    content = b"".join(least.get(slot, 0).to_bytes(SLOT_BYTES) for slot in range(SLOTS))
                    self._write(esapi, info, handle, writer, content, 0)
            finally:
                esapi.tr_close(handle)
        for slot, sequence in least.items():
            self.raise_to(info, writer, slot, sequence)

    def _define(self, esapi: Any, info: AnchorInfo, writer_point: bytes) -> None:
        public = TPM2B_NV_PUBLIC(
            TPMS_NV_PUBLIC(
                nvIndex=info.index,
                nameAlg=TPM2_ALG.SHA256,
                attributes=TPMA_NV(_ATTRIBUTES),
                authPolicy=revocation_write_policy(info.locality, p256_key_name(writer_point)),
                dataSize=INDEX_BYTES,
            )
        )
        with self._link.session(esapi, self._srk.handle(esapi)) as owner:
            esapi.tr_close(esapi.nv_define_space(None, public, session1=owner))

    def read(self, info: AnchorInfo) -> tuple[int, ...]:
        """Return the sequences of all slots, in a salted session. Raises RevocationMissing, RevocationDenied."""
        with self._link.operation(f"read NV index 0x{info.index:08x}") as esapi:
            handle = open_revocation(esapi, info)
            try:
                with (
                    self._link.session(esapi, self._srk.handle(esapi)) as session,
                    rc.meaning(revocation_meanings(info, "read it")),
                ):
                    content = bytes(esapi.nv_read(handle, INDEX_BYTES, 0, handle, session1=session))
            finally:
                esapi.tr_close(handle)
        return tuple(int.from_bytes(content[start : start + SLOT_BYTES]) for start in range(0, INDEX_BYTES, SLOT_BYTES))

    def raise_to(self, info: AnchorInfo, writer: RevocationWriter, slot: int, sequence: int) -> bool:
        """Have a slot hold at least `sequence`; tells whether it was written. Never lowers one.

        Raises RevocationMissing, RevocationDenied, WrongLocality.
        """
        if sequence <= self.read(info)[slot]:
            return False
        with self._link.operation(f"write NV index 0x{info.index:08x}") as esapi:
            handle = open_revocation(esapi, info)
            try:
                self._write(esapi, info, handle, writer, sequence.to_bytes(SLOT_BYTES), slot * SLOT_BYTES)
            finally:
                esapi.tr_close(handle)
        return True

    def renew(self, writer: RevocationWriter, least: dict[int, int], prefer: int = FIRST_INDEX) -> AnchorInfo:
        """Have an index of this writer that can be read and holds at least `least`; for a recovery.

        What somebody defined anew in its place, with a password of his own, is removed first: it has our Name.
        Raises OwnerAuthWanted, TpmFull, WrongLocality.
        """
        info = self.place(writer.point, prefer)
        try:
            self.ensure(info, writer, least)
        except RevocationDenied:
            self.undefine(info)
            self.ensure(info, writer, least)
        return info

    def undefine(self, info: AnchorInfo) -> None:
        """Remove an index by its Name (owner authorisation). Raises RevocationMissing, OwnerAuthWanted."""
        with self._link.operation(f"remove NV index 0x{info.index:08x}") as esapi:
            with rc.meaning({rc.RC_HANDLE: lambda: RevocationMissing(info.index, "it does not exist")}):
                handle = esapi.tr_from_tpmpublic(info.index)
            if not _is_pinned(esapi, handle, info):
                esapi.tr_close(handle)
                raise RevocationMissing(info.index, "another index has its number")
            with self._link.session(esapi, self._srk.handle(esapi)) as owner:
                esapi.nv_undefine_space(handle, session1=owner)

    def _write(
        self, esapi: Any, info: AnchorInfo, handle: Any, writer: RevocationWriter, content: bytes, offset: int
    ) -> None:
        with (
            self._link.session(esapi, self._srk.handle(esapi), policy=True) as session,
            rc.meaning(revocation_meanings(info, "write it")),
        ):
            if info.locality is not None:
                esapi.policy_locality(session, TPMA_LOCALITY.TWO)
            policy_signed(
                esapi, session, writer.point, b"", writer.sign, lambda _why: RevocationDenied(info.index, "write it")
            )
            esapi.nv_write(handle, content, offset, handle, session1=session)

    def _open(self, esapi: Any, info: AnchorInfo, writer_point: bytes) -> tuple[Any, bool]:
        """Return ESYS_TR of this writer's index and whether it was ever written. Raises RevocationMissing."""
        handle = esapi.tr_from_tpmpublic(info.index)
        name = bytes(esapi.tr_get_name(handle))
        if name == info.name:
            return handle, True
        if name == _name(info.index, info.locality, writer_point, written=False):
            return handle, False
        esapi.tr_close(handle)
        raise RevocationMissing(info.index, f"another index with the Name {name.hex()} is there")


def open_revocation(esapi: Any, info: AnchorInfo) -> Any:
    """Return ESYS_TR of the index with the pinned Name, with the empty password. Raises RevocationMissing."""
    with rc.meaning({rc.RC_HANDLE: lambda: RevocationMissing(info.index, "it does not exist")}):
        handle = esapi.tr_from_tpmpublic(info.index)
    name = bytes(esapi.tr_get_name(handle))
    if name != info.name:
        esapi.tr_close(handle)
        raise RevocationMissing(info.index, f"its Name is {name.hex()}: it was defined anew, or never written")
    esapi.tr_set_auth(handle, None)
    return handle


def revocation_meanings(info: AnchorInfo, doing: str) -> rc.Special:
    """Return what the TPM's codes mean in commands on the index."""

    def denied() -> TpmError:
        return RevocationDenied(info.index, doing)

    return {
        rc.RC_AUTH_FAIL: denied,
        rc.RC_BAD_AUTH: denied,
        rc.RC_NV_AUTHORIZATION: denied,
        rc.RC_POLICY_FAIL: denied,
        rc.RC_NV_UNINITIALIZED: lambda: RevocationMissing(info.index, "it was defined anew and never written"),
        rc.RC_LOCALITY: lambda: WrongLocality(2, f"it refused to {doing}, the revocation index wants locality 2"),
    }


def _is_pinned(esapi: Any, handle: Any, info: AnchorInfo) -> bool:
    """Tell whether an index is the pinned one, or was it before it was first written."""
    area = esapi.nv_read_public(handle)[0].nvPublic
    attributes = int(area.attributes) | _WRITTEN
    return nv_index_name(int(area.nvIndex), attributes, bytes(area.authPolicy), int(area.dataSize)) == info.name


def _name(index: int, locality: int | None, writer_point: bytes, *, written: bool) -> bytes:
    policy = revocation_write_policy(locality, p256_key_name(writer_point))
    return nv_index_name(index, _ATTRIBUTES | (_WRITTEN if written else 0), policy, INDEX_BYTES)
