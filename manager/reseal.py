"""`vtpm-manager reseal`: seals every key anew, to the PCRs of now and to predicted ones. No manager may run."""

import logging
from dataclasses import dataclass, replace

from manager.anchor import clean_stop
from manager.anchoring import note_present
from manager.approval_files import write_targets
from manager.approval_key import ApproverPublic
from manager.approval_recover import by_another_approver, of_this_index, platform_policy_reference, with_index
from manager.catalogue_place import place_of
from manager.config import Config, Layout
from manager.errors import DeniedError, IntegrityError, ManagerError, UsageError
from manager.group_rows import follow_seals
from manager.group_terms import Terms, Wanted, seal_key
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import PolicyMismatch, RecoveryRefused
from manager.hwtpm_records import SealedBlob
from manager.keys import BootArea, GroupSeal, catalogue_key
from manager.opening import Opened, Unsealer, integrity, locked_store, open_store, open_tpm, read_boot_area
from manager.policy import parse_pcrs
from manager.provision import PCRS_NONE, policy_for
from manager.recovery_key import RecoveryPrivate, RecoveryPublic
from storage.catalogue import Catalogue
from storage.store_records import PutGroup

_log = logging.getLogger("vtpm.reseal")


@dataclass(frozen=True, slots=True)
class Resealed:
    """What was sealed anew, in words; the groups that stay as they were, and why; the new configuration."""

    done: list[str]
    left: dict[str, str]
    config: Config


def reseal(
    layout: Layout,
    config: Config,
    recovery: RecoveryPrivate | None,
    predicted: dict[int, bytes],
    pcrs: str | None,
    saa: str | None = None,
) -> Resealed:
    """Seal every key anew to the PCR values of now (and to predicted ones beside them).

    With `recovery` the old seals are opened by the recovery key, whatever the PCRs are; without it by their policy. A
    group that neither opens stays as it is, and the others are done. `saa` (PEM, by the recovery key only) takes the
    approver's place, for the store key and the groups that had the same one: what is to be approved is written anew.

    Raises:
        DeniedError: the store key's policy does not hold, or another approver is wanted, and no recovery key was given.
        ManagerError: see the messages.

    """
    selection = pcrs or config.tpm.pcrs
    with locked_store(layout) as descriptor, open_tpm(layout, config) as tpm:
        _refuse_unrecoverable(read_boot_area(descriptor)[1], selection)
        opened = open_store(descriptor, tpm, config, unsealer(tpm, recovery))
        try:
            # the boot area as the store vouches for it: who writes the disk must not choose to whom keys are escrowed
            former = opened.boot.saa
            if saa is not None:
                _refuse_without(recovery, opened.boot)
                opened.boot = by_another_approver(opened.boot, saa)
            boot = opened.boot
            public = RecoveryPublic.parse(boot.recovery.encode(), "the store") if boot.recovery else None
            work = _Reseal(tpm, opened, Terms(selection, public, boot.saa), predicted, former)
            work.refuse_stray()
            note_present(opened.store, tpm.pcr22_read() if tpm.locality == 2 else None)
            done = work.run()
            tpm.anchor_write(boot.anchor, opened.secret.anchor_auth, clean_stop(opened.store.digest()))
            if saa is not None:
                write_targets(layout, tpm, opened.store.uuid, opened.boot, opened.store.groups(), selection)
            _tell_catalogue(layout, config, opened, replaced=opened.boot.saa != former)
            left = {
                GroupSeal.unpack(opened.store.groups()[group].blob).name: reason
                for group, reason in opened.closed.items()
            }
        finally:
            opened.store.close()
            opened.secret.wipe()
    return Resealed(done, left, replace(config, tpm=replace(config.tpm, pcrs=selection)))


def _refuse_unrecoverable(untrusted: BootArea, selection: str) -> None:
    """Refuse, before anything is unsealed, PCRs that nobody could undo, and a recovery key that is not the seal's."""
    if not untrusted.recovery:
        if selection != PCRS_NONE:
            raise UsageError("this installation has no recovery key, so no PCRs can be bound: --pcrs none")
        return
    public = RecoveryPublic.parse(untrusted.recovery.encode(), "the store's boot area")
    if public.signing_point != untrusted.platform.policy.recovery_point:
        raise IntegrityError(
            "the recovery key in the store's boot area is not the one that the store key is sealed to: somebody "
            "changed it. Nothing was changed"
        )


def _refuse_without(recovery: RecoveryPrivate | None, boot: BootArea) -> None:
    """Refuse another approver without the recovery key: who may run the platform does not choose who approves it."""
    if recovery is None or recovery.public.signing_point != boot.platform.policy.recovery_point:
        raise DeniedError("another approver takes the installation's recovery key: --recovery-key. Nothing was changed")


def unsealer(tpm: HardwareTpm, recovery: RecoveryPrivate | None) -> Unsealer:
    """Return how objects are opened: by their policy, with `recovery` by the recovery key where it is theirs."""
    if recovery is None:
        return tpm.unseal

    def unseal(blob: SealedBlob) -> bytes:
        try:
            return tpm.unseal_with_recovery(blob, recovery.sign_statement)
        except RecoveryRefused as refused:  # a group may have another recovery key, and its policy hold all the same
            try:
                return tpm.unseal(blob)
            except PolicyMismatch:
                raise refused from None

    return unseal


class _Reseal:
    """Seals all keys of an opened installation; `terms` are the installation's, `former` is who approved it before."""

    def __init__(
        self, tpm: HardwareTpm, opened: Opened, terms: Terms, predicted: dict[int, bytes], former: str
    ) -> None:
        self._tpm, self._store, self._opened = tpm, opened.store, opened
        self._terms, self._predicted = terms, predicted
        recovery = terms.recovery.to_pem().decode() if terms.recovery is not None else ""
        seals = {group: GroupSeal.unpack(record.blob) for group, record in opened.store.groups().items()}
        if former != terms.saa:
            wanted = Wanted(saa=terms.saa)
            seals = {group: wanted.applied(seal) if seal.saa == former else seal for group, seal in seals.items()}
        self._seals = {group: seal for group, seal in seals.items() if group not in opened.closed}
        self._its = {group: Terms.of(seal, terms.pcrs, recovery) for group, seal in self._seals.items()}

    def refuse_stray(self) -> None:
        """Raise UsageError for a predicted PCR to which nothing is bound."""
        bound = {pcr for terms in (self._terms, *self._its.values()) for pcr in _selected(terms)}
        stray = sorted(set(self._predicted) - bound)
        if stray:
            raise UsageError(f"PCR {stray[0]} is predicted but not bound ({self._terms.pcrs})")

    def run(self) -> list[str]:
        """Reseal groups first, the platform object last: what was interrupted can be done again with the same key."""
        self._opened.boot = with_index(self._tpm, self._store, self._opened.boot, self._opened.secret)
        done, boot = [], self._opened.boot
        for group, seal in self._seals.items():
            terms = self._its[group]
            with self._store.group_key(group) as key:
                made = seal_key(
                    self._tpm,
                    self._store.uuid,
                    group,
                    key,
                    of_this_index(seal, boot),
                    terms,
                    self._values(terms),
                    boot.revocation,
                )
            self._store.commit([PutGroup(replace(self._store.groups()[group], blob=made.pack()))])
            done.append(f"group {seal.name}")
        terms, reference = self._terms, platform_policy_reference(self._store, boot)
        policy = policy_for(self._tpm, terms.pcrs, terms.recovery, reference, self._values(terms), saa=terms.saa)
        sealed = self._tpm.seal(self._opened.secret.reveal(), policy)
        self._opened.boot = replace(boot, platform=sealed)
        self._store.write_boot_area(self._opened.boot.pack())
        return [*done, "the store key"]

    def _values(self, terms: Terms) -> tuple[dict[int, bytes], ...]:
        """Return the predicted values beside those of now, of the PCRs that are bound here."""
        bound = _selected(terms)
        predicted = {pcr: value for pcr, value in self._predicted.items() if pcr in bound}
        return (self._tpm.pcr_values_to_seal(bound) | predicted,) if predicted else ()


def _selected(terms: Terms) -> tuple[int, ...]:
    return () if terms.saa or terms.pcrs == PCRS_NONE else parse_pcrs(terms.pcrs)


def _tell_catalogue(layout: Layout, config: Config, opened: Opened, *, replaced: bool) -> None:
    """Have the catalogue's groups say what their keys are sealed to now; without a catalogue the reseal is done too."""
    key = catalogue_key(opened.secret.store_key, opened.store.uuid)
    try:
        with integrity(), Catalogue.open(place_of(layout, config), key, opened.store.uuid) as catalogue:
            follow_seals(catalogue, opened.store)
            if replaced:
                now = ApproverPublic.parse(opened.boot.saa.encode()).fingerprint.hex()
                catalogue.log("approver-replaced", None, f"what the store key is sealed for is {now} now")
    except ManagerError as error:
        _log.warning("resealed, but the catalogue does not say so ('vtpm-verify' will): %s", error)
