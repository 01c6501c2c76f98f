"""Deep quotes: the vTPM's evidence from its instance, the hardware TPM's quote over it, together in one bundle.

An administrator's quote: the instance is ordered to give evidence; a guest's: its instance sends evidence of its own
accord. Either way the hardware TPM signs in its own lane, and nobody else's commands wait for that.
"""

import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Final
from uuid import UUID

import trio

from frontend_backend import messages_instance as m
from frontend_backend.deep_quote import Evidence, check_wish
from frontend_backend.errors import MessageError
from frontend_backend.measurements import all_from_text
from manager.approval_records import pcrs_of, sequence_in_use
from manager.attest_bundle import Bundle, HardwareQuote, Statement
from manager.attestation import key_of
from manager.either import either
from manager.errors import BusyError, ConflictError, IntegrityError, ManagerError, UsageError
from manager.event_log import event_log
from manager.groups import Groups
from manager.hardware import Hardware
from manager.hwtpm import HardwareTpm
from manager.hwtpm_quote import AttestationKey
from manager.keys import GroupSeal
from manager.policy import parse_any_pcrs
from manager.quote_task import QuoteTask
from manager.registry import Registry
from manager.running import Running, Stage
from storage.catalogue import AttachmentRow, VtpmRow
from storage.errors import StorageError

_log = logging.getLogger("vtpm.quotes")
EVIDENCE_SECONDS: Final = 30.0  # a guest may keep its TPM busy with a key for so long
_FALLS_ASLEEP: Final = 3  # times that an instance may have begun to hibernate just before it is asked
GUESTS_WAITING: Final = 8  # guests' quotes under way; more would keep the manager's own work from the hardware TPM
Awake = Callable[[], Awaitable[Running | None]]
MANAGER: Final = f"vtpm-manager {metadata.version('vtpm-manager')}"


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a statement says of a vTPM beside nonce and evidence."""

    vtpm: UUID
    group: UUID
    family: str
    generation: int
    guest: str
    frontend: str
    startup: str
    hw_pcrs: str
    late: bool | None
    event_log: bytes


class Quotes:
    """Makes deep quotes of a running manager's vTPMs; `pcrs` are the hardware PCRs in them."""

    def __init__(self, registry: Registry, groups: Groups, hardware: Hardware, pcrs: str) -> None:
        """Quote vTPMs of `registry`. Raises BadSetting: no such PCRs."""
        self._registry, self._groups, self._hardware = registry, groups, hardware
        self._selection = sum(1 << pcr for pcr in parse_any_pcrs(pcrs))
        self._guests = 0

    def refuse(self, row: VtpmRow, nonce: bytes, selection: int) -> None:
        """Refuse what cannot be quoted, before its TPM is woken or asked in vain; raises as `of` does."""
        try:
            check_wish(nonce, selection)
        except MessageError as error:
            raise UsageError(f"{error}. Nothing was quoted") from error
        self._refuse_closed(row.group)
        key_of(self._groups.seal(row.group))

    async def of(self, row: VtpmRow, awake: Awake, nonce: bytes, selection: int) -> bytes:
        """Return the bundle of a deep quote for an administrator; the caller holds the vTPM's lock.

        `awake` returns the vTPM's instance, woken where it sleeps.

        Raises:
            UsageError: the nonce has not 1 to 64 bytes. ConflictError: it does not run, or its group has no key.
            BusyError: its instance did not answer. DeniedError: its group is closed. TpmError: the hardware TPM.
            IntegrityError: its instance gave what is no evidence of it.

        """
        self.refuse(row, nonce, selection)
        untrusted = await _evidence(row, awake, nonce, selection)
        try:
            evidence = Evidence.unpack(untrusted)
            if evidence.selection != selection:
                raise MessageError("it is of other PCRs than were asked for")
            return await self._bundle(row.uuid, nonce, evidence, for_guest=False)
        except MessageError as error:
            raise IntegrityError(
                f"what the instance of vTPM {row.name} gave is no evidence of it: {error}. Nothing was quoted. Its "
                f"guest may have taken its instance over: detach it, and look at the log"
            ) from error

    async def for_guest(self, running: Running, request: m.Quote) -> m.Reply:
        """Answer a guest's wish, or refuse it: too often, malformed, or not possible."""
        full = running.quoting or self._guests >= GUESTS_WAITING
        if full or not running.guest_quotes.take(time.monotonic()):
            return m.Refusal(m.RefusalCode.LIMIT, "asked too often")
        self._guests += 1
        running.quoting = True
        try:
            check_wish(request.nonce, 1)
            evidence = Evidence.unpack(request.evidence)
            return m.QuoteReply(await self._bundle(running.vtpm, request.nonce, evidence, for_guest=True))
        except MessageError as error:
            return m.Refusal(m.RefusalCode.MALFORMED, str(error)[:200])
        except (ManagerError, StorageError) as error:
            return m.Refusal(m.RefusalCode.DENIED, str(error)[:200])
        except Exception:  # noqa: BLE001 - our own mistake in one guest's quote must not end every vTPM's manager
            _log.exception("vTPM %s: a guest's quote failed in a way nobody foresaw", running.vtpm)
            return m.Refusal(m.RefusalCode.DENIED, "the manager made a mistake; see its log")
        finally:
            self._guests -= 1
            running.quoting = False

    def _refuse_closed(self, group: UUID) -> None:
        self._groups.refuse_closed(self._groups.find(str(group)))

    async def _bundle(self, vtpm: UUID, nonce: bytes, evidence: Evidence, *, for_guest: bool) -> bytes:
        """Have the hardware TPM sign. Raises MessageError: evidence of another TPM. ManagerError, StorageError."""
        facts = self._facts(vtpm)
        self._refuse_closed(facts.group)
        if evidence.family.value != facts.family:  # or a TPM 2.0 could do without a quote of its own
            raise MessageError(f"it is of a TPM {evidence.family.value}, and the vTPM is a TPM {facts.family}")
        seal = self._groups.seal(facts.group)
        key = key_of(seal)

        def statement(approval: int) -> Statement:
            return Statement(
                nonce=nonce,
                vtpm=vtpm,
                group=facts.group,
                store=self._registry.committer.store.uuid,
                approval=approval,
                generation=facts.generation,
                for_guest=for_guest,
                guest=facts.guest,
                frontend=facts.frontend,
                startup=facts.startup,
                hw_pcrs=facts.hw_pcrs,
                manager=MANAGER,
                evidence=hashlib.sha256(evidence.pack()).digest(),
                late=facts.late,
                event_log=facts.event_log,
            )

        def sign(tpm: HardwareTpm, key: AttestationKey) -> tuple[Statement, HardwareQuote]:
            said = statement(_approval(tpm, seal))
            return said, tpm.attester.quote(key, self._selection, said.digest())

        said, quote = await self._hardware.lane.run(sign, self._hardware.tpm, key)
        return Bundle(said, evidence, quote).pack()

    def _facts(self, vtpm: UUID) -> _Facts:
        row, attachment = self._registry.find(str(vtpm)), self._registry.catalogue.find_attachment(vtpm)
        if attachment is None:
            raise ConflictError(f"vTPM {row.name} is not attached to a guest; nothing was quoted")
        return _facts(row, attachment, self._registry.record(vtpm).generation)


def _facts(row: VtpmRow, attachment: AttachmentRow, generation: int) -> _Facts:
    return _Facts(
        row.uuid,
        row.group,
        row.family,
        generation,
        attachment.guest,
        attachment.frontend,
        attachment.startup,
        attachment.hw_pcrs,
        attachment.ran_before,
        _logged(row.family, attachment.measured),
    )


def _logged(family: str, measured: str) -> bytes:
    """Return the SHA-256 of a boot's event log, nothing where the boot was not measured. Raises MessageError."""
    return hashlib.sha256(event_log(family, all_from_text(measured))).digest() if measured else b""


def _approval(tpm: HardwareTpm, seal: GroupSeal) -> int:
    """Return the sequence of the newest installed approval that holds now, 0 where there is none."""
    if not seal.approvals:
        return 0
    return sequence_in_use(seal, tpm.pcr_read(pcrs_of([seal])), time.time()) or 0


async def _evidence(row: VtpmRow, awake: Awake, nonce: bytes, selection: int) -> bytes:
    """Have a vTPM's instance make evidence; where it has just gone to sleep, the one that is woken then."""
    for _ in range(_FALLS_ASLEEP):
        running, task = _fit(row, await awake()), QuoteTask(nonce, selection)
        running.order_quote(task)
        try:
            with trio.move_on_after(EVIDENCE_SECONDS):
                await either(task.done, running.ended)
        finally:
            running.quote = None
        if task.done.is_set():
            return _told(row, task)
        if running.stage is not Stage.HIBERNATED:
            break
    raise BusyError(
        f"the instance of vTPM {row.name} gave no evidence within {EVIDENCE_SECONDS:g} s: its guest keeps it busy, "
        f"or it ended. Nothing was quoted; try again"
    )


def _fit(row: VtpmRow, running: Running | None) -> Running:
    if running is None or running.stage is not Stage.RUNNING:
        raise ConflictError(
            f"vTPM {row.name} does not run, so there is nothing to quote; nothing was done. 'vtpm-show {row.name}' "
            f"says how it is, 'vtpm-attach' starts it"
        )
    if running.report is None or not running.report.quotes:
        raise ConflictError(
            f"the instance of vTPM {row.name} was started by an earlier version, which makes no quotes; nothing was "
            f"done. Detach it and attach it again"
        )
    return running


def _told(row: VtpmRow, task: QuoteTask) -> bytes:
    if task.problem:
        told = "".join(character if character.isprintable() else "?" for character in task.problem)
        raise ConflictError(f"vTPM {row.name} gives no evidence: {told}. Nothing was quoted")
    return task.evidence
