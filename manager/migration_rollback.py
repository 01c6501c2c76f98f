"""What going back to an older store, or to another TPM, means for migration: nobody may run what perhaps left.

An older store does not know of a claim that came later. So whatever was authorised to leave is frozen, as if claimed by
each manager that could have: 'vtpm-migrate-reclaim' asks them. And this manager gets a new identity, so that
a copy of an installation cannot claim, or repeat a claim, in the name of the one that it is a copy of.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final
from uuid import UUID

from manager.errors import IntegrityError
from manager.keys import BootArea
from manager.migration_box import NAMES, read, seal, write
from manager.migration_records import frozen, is_away
from manager.migration_state import Departure, MigrationState, Peer
from storage.secrets import StoreKey
from storage.store import Store
from storage.store_records import PutVtpm, RecordFlags, VtpmRecord

_NO_EXPORT: Final = bytes(16).hex()
_AT_ONCE: Final = 500  # records in one commit


def may_have_left(store: Store, state: MigrationState) -> Iterator[tuple[VtpmRecord, list[Peer]]]:
    """Return the vTPMs of open groups that some manager could have claimed since, and which ones."""
    for record in store.vtpms():
        if record.flags & RecordFlags.FRESH or is_away(record.flags):
            continue
        known = [*(state.claimants if record.group in state.doubtful else ()), *state.peers.values()]
        peers = {
            peer.fingerprint: peer
            for peer in known
            if record.uuid in peer.leave_vtpms or record.group in peer.leave_groups
        }
        if peers:
            yield record, list(peers.values())


def in_words(state_dir: Path, key: StoreKey, store: Store, boot: BootArea) -> Iterator[tuple[UUID | None, str]]:
    """Return what an operator is told before he accepts: by vTPM, None for all of them."""
    try:
        state, _ = read(state_dir, key, store.uuid, boot.migration)
    except IntegrityError as error:
        text = (
            "which vTPMs may have left for another manager is not known, so none will be frozen, and one that left "
            "would run twice: put the files back that belong to this store, or ask those who run the others"
        )
        yield None, f"{text}. {error}"
        return
    for record, peers in may_have_left(store, state):
        names = ", ".join(peer.name for peer in peers)
        text = (
            f"it may have left for {names} since, and run there: it will be frozen; vtpm-migrate-reclaim asks {names}"
        )
        yield record.uuid, text


def with_departures(state: MigrationState, left: Sequence[tuple[VtpmRecord, list[Peer]]]) -> MigrationState:
    """Return the state in which these vTPMs were claimed by any of the managers that could have."""
    now = int(time.time())
    departures = {record.uuid: _departure(record, peers, now) for record, peers in left}
    return replace(state, departures={**state.departures, **departures})


def begin_anew(state_dir: Path, key: StoreKey, store: Store, boot: BootArea) -> BootArea:
    """Freeze what may have left, forget the identity and what was claimed; returns the boot area, written.

    May be done again. Raises StorageError, OSError.
    """
    if not boot.migration:
        return boot
    boot = replace(boot, identity="")
    try:
        state, index = read(state_dir, key, store.uuid, boot.migration)
    except IntegrityError:  # told before; the manager says so at each start, and moves nothing
        store.write_boot_area(boot.pack())
        return boot
    left = list(may_have_left(store, state))
    closed = tuple(group for group in store.groups() if not store.is_open(group))
    arrivals = {vtpm: replace(arrival, export="", claim="") for vtpm, arrival in state.arrivals.items()}
    claimants = tuple(dict.fromkeys((*state.claimants, *state.peers.values()))) if closed else ()
    state = replace(
        with_departures(state, left), identity=None, arrivals=arrivals, doubtful=closed, claimants=claimants
    )
    sealed = seal(key, store.uuid, state.pack())
    write(state_dir / NAMES[1 - index], sealed)
    boot = replace(boot, migration=hashlib.sha256(sealed).hexdigest())
    store.write_boot_area(boot.pack())  # first: what is frozen is not looked at again, and must say for whom
    for start in range(0, len(left), _AT_ONCE):
        store.commit([PutVtpm(frozen(record)) for record, _ in left[start : start + _AT_ONCE]])
    return boot


def _departure(record: VtpmRecord, peers: list[Peer], now: int) -> Departure:
    return Departure(
        vtpm=record.uuid,
        peer=", ".join(peer.name for peer in peers),
        fingerprint=",".join(peer.fingerprint for peer in peers),
        export=_NO_EXPORT,
        claim="",
        generation=record.generation,
        since=now,
    )
