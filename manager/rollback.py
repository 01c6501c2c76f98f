"""`vtpm-manager accept-rollback`: the newest store is lost, and the operator goes back to an older one, on purpose.

The one way past the rollback rule on the TPM that the store is sealed to. It says what will be lost before anything
is changed, and the catalogue keeps that it was done. On another TPM, or a cleared one, `recovery` is due.
"""

import hmac
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import UUID

from manager import escrow, hierarchies
from manager.anchor import clean_stop, judge
from manager.anchoring import position_of
from manager.approval_errors import RevocationDenied, RevocationMissing
from manager.attachment_epochs import problem_of, renumber
from manager.catalogue_place import place_of
from manager.config import Config, Layout
from manager.errors import ConflictError, DeniedError, IntegrityError, RolledBackError
from manager.escrow import EscrowPlace, EscrowPurpose
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import (
    AnchorDenied,
    AnchorMissing,
    PolicyMismatch,
    RecoveryRefused,
    SealDamaged,
)
from manager.keys import BootArea, GroupSeal, PlatformSecret, catalogue_key, store_check
from manager.migration_rollback import begin_anew, in_words
from manager.opening import integrity, locked_store, open_tpm, pin_srk, read_boot_area
from manager.recovery_errors import EscrowError
from manager.recovery_key import RecoveryPrivate
from manager.rollback_losses import Loss, losses_of, perhaps_left
from storage.catalogue import Catalogue
from storage.catalogue_rows import AttachmentRow, Happened
from storage.secrets import GroupKey
from storage.store import Store

_log = logging.getLogger("vtpm.rollback")
EVENT: Final = "rollback-accepted"
_STAYS_CLOSED: Final = (PolicyMismatch, RecoveryRefused, RevocationDenied, RevocationMissing, SealDamaged)
_NOT_REFUSED: Final = (
    "this store is not refused: it is the newest one as far as the hardware TPM's anchors can tell, and "
    "'vtpm-manager run' starts it. Nothing was changed"
)


@dataclass(frozen=True, slots=True)
class Rollback:
    """What going back to the store at hand means. `why` is what the rule says of it, `written` when its file was."""

    store: UUID
    sequence: int
    written: str
    newest_event: str
    vtpms: int
    why: str
    recovery_key: bool
    closed: tuple[str, ...]
    losses: tuple[Loss, ...]

    @property
    def phrase(self) -> str:
        """What has to be typed where there is no recovery key."""
        return f"roll back to sequence {self.sequence}"


class Acceptance:
    """An installation whose store the rollback rule refuses, locked, with nothing changed yet."""

    def __init__(
        self, tpm: HardwareTpm, store: Store, boot: BootArea, secret: PlatformSecret, state_dir: Path, *, key: bool
    ) -> None:
        """Made by `refused_store`; `key`: the recovery key was given, and it opened the escrow."""
        self._state_dir = state_dir
        self._tpm, self._store, self._boot, self._secret, self._key = tpm, store, boot, secret, key
        self.catalogue: Catalogue | None = None
        self.stale: list[AttachmentRow] = []
        self.found: Rollback

    def accept(self, confirmed: str | None) -> str:
        """Have the anchors stand for this store; returns what the event says. `confirmed`: what the operator typed.

        Raises:
            DeniedError: the recovery key, or without one the phrase, is missing. TpmError: as told; do it again then.

        """
        if self.found.recovery_key and not self._key:
            raise DeniedError(
                "going back to an older store takes the recovery key: --key FILE. Nothing was changed, and this "
                "store is still refused"
            )
        if not self.found.recovery_key and confirmed != self.found.phrase:
            raise DeniedError(
                f"nothing was changed: this installation has no recovery key, so type exactly '{self.found.phrase}', "
                f"or give it with --confirm"
            )
        how = "with the recovery key" if self._key else "without a recovery key, by a typed confirmation"
        losses = f"{len(self.found.losses)} losses known"
        text = f"by user {os.getuid()} {how}: back to sequence {self.found.sequence}, {losses}; {self.found.why}"
        if self.catalogue is not None:  # first: what was done must never be without its trace
            self.catalogue.log(EVENT, None, text)
            for row in self.stale:
                lost = Happened("detached", f"the store it was attached in is lost; it was for guest {row.guest}")
                self.catalogue.detach(row.vtpm, lost)
        _log.warning("%s %s", EVENT, text)
        with integrity():
            renumber(self._store, self.catalogue)
            self._boot = begin_anew(self._state_dir, self._secret.store_key, self._store, self._boot)
        self._make_it_the_newest()
        return text

    def _make_it_the_newest(self) -> None:
        """Make a state that no image had before, and anchor it as a clean stop.

        The frame still names the old anchor's ancestors, not the index's present content: until the index is written
        the store is refused as before, so a cut acceptance is done again, with its question.
        """
        with integrity():
            self._store.commit((), notes=True)
        auth = self._secret.anchor_auth
        try:
            self._tpm.anchor_write(self._boot.anchor, auth, clean_stop(self._store.digest()), first=True)
        except (AnchorMissing, AnchorDenied):
            anchor = self._tpm.anchor_plan(self._tpm.anchor_free_index())
            self._store.write_boot_area(replace(self._boot, anchor=anchor).pack())
            self._tpm.anchor_define(anchor.index, auth)
            self._tpm.anchor_write(anchor, auth, clean_stop(self._store.digest()), first=True)


@contextmanager
def refused_store(
    layout: Layout, config: Config, key: RecoveryPrivate | None, *, without_catalogue: bool = False
) -> Iterator[Acceptance]:
    """Open an installation whose store the rollback rule refuses, and find out what going back to it would lose.

    Raises:
        ConflictError: the rule does not refuse it. TpmCleared, SrkChanged: another TPM, see `recovery`. DeniedError: no
        key, and the TPM's policy does not hold. EscrowError, IntegrityError, TpmError, BusyError: see their messages.

    """
    with ExitStack() as open_now:
        descriptor = open_now.enter_context(locked_store(layout))
        tpm = open_now.enter_context(open_tpm(layout, config))
        pin_srk(tpm, config)
        uuid, boot = read_boot_area(descriptor)
        secret = _platform_secret(tpm, uuid, boot, key)
        open_now.callback(secret.wipe)
        hierarchies.use(tpm, secret)
        if not hmac.compare_digest(store_check(secret.store_key, uuid), config.tpm.store_check):
            raise IntegrityError("this store was not made by this installation. Nothing was changed")
        with integrity():
            store = open_now.enter_context(Store.open(descriptor, secret.store_key))
        boot = BootArea.unpack(store.boot_area)  # what stood in clear has served to get here; this one is authentic
        why = _refusal(tpm, store, boot, secret)
        made = Acceptance(tpm, store, boot, secret, layout.state_dir, key=key is not None)
        closed = _unlock(tpm, store, key)
        if not without_catalogue:
            made.catalogue = open_now.enter_context(_catalogue(layout, config, secret, uuid))
            made.stale = [row for row in made.catalogue.attachments() if problem_of(store, row) is not None]
        made.found = Rollback(
            store=uuid,
            sequence=store.sequence,
            written=_time(layout.store.stat().st_mtime),
            newest_event=_newest_event(made.catalogue),
            vtpms=len(store),
            why=why,
            recovery_key=_has_recovery_key(boot),
            closed=closed,
            losses=(
                *losses_of(store, made.catalogue, layout.state_images, made.stale),
                *perhaps_left(store, made.catalogue, in_words(layout.state_dir, secret.store_key, store, boot)),
            ),
        )
        yield made


def _has_recovery_key(boot: BootArea) -> bool:
    return bool(boot.recovery or boot.escrow or boot.platform.policy.recovery_point)


def _platform_secret(tpm: HardwareTpm, store: UUID, boot: BootArea, key: RecoveryPrivate | None) -> PlatformSecret:
    if key is None:
        return PlatformSecret(tpm.unseal(boot.platform))
    if not boot.escrow:
        raise ConflictError("this installation was made without a recovery key: do without --key. Nothing was changed")
    return PlatformSecret(escrow.unwrap(boot.escrow, key, EscrowPlace(store, EscrowPurpose.STORE_KEY)))


def _refusal(tpm: HardwareTpm, store: Store, boot: BootArea, secret: PlatformSecret) -> str:
    """Return why the store is refused. Raises ConflictError where it is not."""
    try:
        durable = tpm.anchor_read(boot.anchor, secret.anchor_auth)
        judge(position_of(store), durable, tpm.pcr22_read() if tpm.locality == 2 else None)
    except RolledBackError:
        return "the anchors in the hardware TPM stand for another, newer store"
    except (AnchorMissing, AnchorDenied) as error:
        return f"the durable anchor is gone, so that this is the newest store cannot be told: {error}"
    raise ConflictError(_NOT_REFUSED)


def _unlock(tpm: HardwareTpm, store: Store, key: RecoveryPrivate | None) -> tuple[str, ...]:
    """Unlock what can be unlocked, to see what would be lost; returns the names of the groups that stay closed."""
    closed = []
    for group, record in store.groups().items():
        seal = GroupSeal.unpack(record.blob)
        try:
            opened = _group_key(tpm, store.uuid, group, seal, key)
        except (*_STAYS_CLOSED, EscrowError) as error:
            _log.warning("group %s is closed, what it would lose is not known: %s", seal.name, error)
            closed.append(seal.name)
            continue
        with integrity():
            store.unlock_group(group, opened)
    return tuple(sorted(closed))


def _group_key(tpm: HardwareTpm, store: UUID, group: UUID, seal: GroupSeal, key: RecoveryPrivate | None) -> GroupKey:
    try:
        return GroupKey(tpm.unseal(seal.sealed))
    except _STAYS_CLOSED:
        if key is None or not seal.escrow:
            raise
    return GroupKey(escrow.unwrap(seal.escrow, key, EscrowPlace(store, EscrowPurpose.GROUP_KEY, group)))


@contextmanager
def _catalogue(layout: Layout, config: Config, secret: PlatformSecret, store: UUID) -> Iterator[Catalogue]:
    try:
        with (
            integrity(),
            Catalogue.open(place_of(layout, config), catalogue_key(secret.store_key, store), store) as catalogue,
        ):
            yield catalogue
    except IntegrityError as error:
        raise IntegrityError(
            f"{error}. Nothing was changed: going back has to leave its event in the catalogue. Put a sound one back; "
            f"if it is lost, say --no-catalogue, and run 'vtpm-manager rebuild-catalogue' afterwards"
        ) from error


def _newest_event(catalogue: Catalogue | None) -> str:
    if catalogue is None:
        return ""
    newest = catalogue.events_after(catalogue.before_newest_events(1))
    return newest[-1][1].time if newest else ""


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
