"""The hardware TPM: everything the manager asks of it, synchronous, by one owner. Parts are in the hwtpm_* modules.

No method may be called from two threads at once (`tpm_lane.TpmLane` sees to it), none is cancellable, each has a
deadline. Every method sets the locality before its first command, because swtpm's belongs to the process and any client
may change it. All raise the errors of hwtpm_errors, in particular TpmUnavailable and its children, and connect anew
after a broken connection.
"""

from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

from manager import hwtpm_pcr
from manager.hwtpm_hierarchies import Hierarchy, change_auth, without_tail
from manager.hwtpm_link import LOADED_SESSION_FIRST, TRANSIENT_FIRST, TpmLink
from manager.hwtpm_nv import Anchors
from manager.hwtpm_quote import Attester
from manager.hwtpm_records import AnchorInfo, ClockState, LocalityReport, SealedBlob, TpmProperties
from manager.hwtpm_revocation import Revocations
from manager.hwtpm_seal import Sealer, SignStatement
from manager.hwtpm_setting import TctiSetting
from manager.hwtpm_srk import Srk
from manager.hwtpm_status import TpmStatus
from manager.hwtpm_status import status as read_status
from manager.policy import SealPolicy, check_pcrs

OPEN_SECONDS: Final = 10.0  # a busy TPM at start: another user's command takes at most a few seconds
COMMAND_SECONDS: Final = 60.0  # CreatePrimary on a slow, contended chip took 19 s (reference section 6)


class HardwareTpm:
    """An open hardware TPM. Use `open`, as a context manager or with `close`."""

    def __init__(self, link: TpmLink) -> None:
        self._link = link
        self._srk = Srk(link)
        self._sealer = Sealer(link, self._srk)
        self._anchors = Anchors(link, self._srk)
        self.revocations = Revocations(link, self._srk)
        self.attester = Attester(link, self._srk)

    @classmethod
    def open(
        cls,
        setting: TctiSetting,
        *,
        locality: int = 2,
        deadline: float = OPEN_SECONDS,
        command_seconds: float = COMMAND_SECONDS,
        owner_auth: bytes = b"",
    ) -> Self:
        """Connect, check that the TPM works, and free what a dead owner left in it.

        locality: 2, or 0 as the explicitly allowed weaker mode. deadline: seconds to wait for a busy TPM.
        command_seconds: longest time for one command. owner_auth: password of the owner hierarchy.
        Raises TpmUnavailable (missing), TpmBusy, TpmNotStarted, TpmFailureMode, WrongLocality, BadSetting.
        """
        link = TpmLink(
            setting,
            locality=locality,
            open_seconds=deadline,
            command_seconds=command_seconds,
            owner_auth=owner_auth,
        )
        with link.operation("open it"):
            return cls(link)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the TPM back; idempotent. Its persistent contents stay."""
        self._link.close()

    @property
    def locality(self) -> int:
        """2, or 0 in the weaker mode."""
        return self._link.locality

    @property
    def setting(self) -> TctiSetting:
        """How this TPM is reached."""
        return self._link.setting

    @property
    def commands_sent(self) -> int:
        """Commands put on the wire so far, retries included."""
        return self._link.commands_sent

    def check_locality(self) -> LocalityReport:
        """Prove the locality with PCR 20: it resets at 2 and not at 0. Raises WrongLocality."""
        return hwtpm_pcr.check_locality(self._link)

    def provision_srk(self) -> bytes:
        """Make the SRK at 0x81000001 if there is none, pin the one there, return its Name (34 bytes).

        Raises SrkUnusable: another kind of key is there. OwnerAuthWanted.
        """
        return self._srk.provision()

    def open_srk(self, pinned_name: bytes) -> None:
        """Check that the SRK has this Name; before anything that needs it. Raises TpmCleared, SrkChanged."""
        self._srk.pin(pinned_name)

    def seal(self, secret: bytes, policy: SealPolicy) -> SealedBlob:
        """Seal 1..128 bytes; verified by unsealing before it is returned. Raises SealUnverified.

        The first PCR branches of the policy must hold now, or the verification cannot succeed.
        """
        return self._sealer.seal(secret, policy)

    def unseal(self, blob: SealedBlob, pinned: bytes | None = None) -> bytes:
        """Open a sealed object by a PCR or plain branch. pinned: the SRK's Name, if open_srk was not called.

        Raises PolicyMismatch (`differing` says which PCRs), SealDamaged, TpmCleared, SrkChanged, WrongLocality,
        PcrsMoving.
        """
        self._pin(pinned)
        return self._sealer.unseal(blob)

    def unseal_with_recovery(self, blob: SealedBlob, sign: SignStatement, pinned: bytes | None = None) -> bytes:
        """Open a sealed object by its recovery branch, whatever the PCRs.

        sign: gets a digest of 32 bytes that contains this session's nonceTPM, returns an ECDSA P-256 signature in
        DER; a statement is useless in any other session. Raises RecoveryRefused; otherwise as `unseal`.
        """
        self._pin(pinned)
        return self._sealer.unseal_with_recovery(blob, sign)

    def _pin(self, pinned: bytes | None) -> None:
        if pinned is not None and pinned != self._srk.pinned:
            self._srk.pin(pinned)

    def anchor_free_index(self) -> int:
        """Return an unused NV index for the durable anchor, 0x01800100 or after it. Raises TpmFull."""
        return self._anchors.free_index()

    def anchor_plan(self, index: int) -> AnchorInfo:
        """Return what `anchor_define` of this index will return; asks the TPM nothing."""
        return self._anchors.plan(index)

    def anchor_define(self, index: int, auth: bytes) -> AnchorInfo:
        """Define the durable anchor; auth: 32 random bytes. Write it once with `first=True` before reading.

        Raises AnchorExists, OwnerAuthWanted, TpmFull.
        """
        return self._anchors.define(index, auth)

    def anchor_undefine(self, info: AnchorInfo) -> None:
        """Remove the durable anchor (owner authorisation). Raises AnchorMissing, OwnerAuthWanted."""
        self._anchors.undefine(info)

    def anchor_read(self, info: AnchorInfo, auth: bytes) -> bytes:
        """Return the durable anchor's digest, 32 bytes. Raises AnchorMissing, AnchorDenied."""
        return self._anchors.read(info, auth)

    def anchor_write(self, info: AnchorInfo, auth: bytes, digest: bytes, *, first: bool = False) -> None:
        """Write the durable anchor. Raises AnchorMissing (also if unwritten and not `first`), AnchorDenied."""
        self._anchors.write(info, auth, digest, first=first)

    def pcr22_read(self) -> bytes:
        """Return the volatile anchor, 32 bytes. Raises VolatileAnchorUnavailable without locality 2."""
        return hwtpm_pcr.pcr22_read(self._link)

    def pcr22_extend(self, digest: bytes) -> None:
        """Extend the volatile anchor by 32 bytes. Raises VolatileAnchorUnavailable without locality 2."""
        hwtpm_pcr.pcr22_extend(self._link, digest)

    def clock(self) -> ClockState:
        """Return reset and restart counters; a TPM reset shows as a new reset_count."""
        return hwtpm_pcr.clock(self._link)

    def pcr_read(self, selection: Iterable[int]) -> dict[int, bytes]:
        """Return the SHA-256 values (32 bytes) of these PCRs, any of 0..23."""
        with self._link.operation("read PCRs") as esapi:
            return hwtpm_pcr.read_pcrs(esapi, selection)

    def pcr_read_together(self, selection: Iterable[int]) -> dict[int, bytes]:
        """Return values that these PCRs had at one time. Raises PcrsMoving."""
        return hwtpm_pcr.read_pcrs_together(self._link, selection)

    def pcr_values_to_seal(self, selection: Iterable[int]) -> dict[int, bytes]:
        """Return the present values of a selection fit for sealing. Raises BadSetting for PCR 16, 20, 22, 23."""
        return self.pcr_read(check_pcrs(selection))

    def random(self, count: int) -> bytes:
        """Return random bytes of the TPM, encrypted on the bus once the SRK is open. count: at least 0."""
        gathered = bytearray()
        with self._link.operation("get random bytes") as esapi:
            if self._srk.pinned is None:
                while len(gathered) < count:
                    gathered += bytes(esapi.get_random(count - len(gathered)))
            else:
                with self._link.session(esapi, self._srk.handle(esapi)) as session:
                    while len(gathered) < count:
                        gathered += bytes(esapi.get_random(count - len(gathered), session1=session))
        return bytes(gathered)

    def use_hierarchy_auths(self, owner: bytes, endorsement: bytes) -> None:
        """Use these passwords of the hierarchies from now on, also after connecting anew; sends nothing."""
        self._link.use_auth(owner=without_tail(owner), endorsement=without_tail(endorsement))

    def change_hierarchy_auth(self, hierarchy: Hierarchy, old: bytes, new: bytes) -> None:
        """Change a hierarchy's password (32 bytes at most, empty: none). Raises HierarchyAuthRefused."""
        change_auth(self._link, self._srk, hierarchy, old, new)

    def properties(self) -> TpmProperties:
        """Return manufacturer, firmware, lockout state, which hierarchies have a password."""
        return hwtpm_pcr.properties(self._link)

    def status(self) -> TpmStatus:
        """Return everything the TPM says of itself; see hwtpm_status."""
        return read_status(self._link)

    def transient_handles(self) -> tuple[int, ...]:
        """Return the loaded objects and sessions in the TPM now; between operations there are none of ours."""
        with self._link.operation("list its handles") as esapi:
            return tuple(
                handle
                for first in (TRANSIENT_FIRST, LOADED_SESSION_FIRST)
                for handle in self._link.handles(esapi, first)
            )
