"""What a request of an instance means for its vTPM's record. No I/O: `ring_server` asks, `committer` writes."""

from dataclasses import replace
from typing import Final

from frontend_backend import messages_instance as m
from manager import migration_records
from manager.running import Running
from storage.secrets import StateKey
from storage.store_records import RecordFlags, VtpmRecord

_DIGEST_SIZE: Final = 32
_DEACTIVATED: Final = "deactivated"
# as a number: `~` of an IntFlag has no bits that this version does not know, and those are to stay
SLEPT: Final = int(RecordFlags.RESUMABLE | RecordFlags.HIBERNATED)
_STAY: Final = ~(int(RecordFlags.FRESH | RecordFlags.QUARANTINED) | SLEPT)
_RESUMABLE: Final = int(RecordFlags.RESUMABLE)
_HIBERNATED: Final = int(RecordFlags.HIBERNATED)
_ATTACHED: Final = int(RecordFlags.ATTACHED)


def load_reply(
    running: Running, record: VtpmRecord, startup: str, commit_timeout: float, measured: tuple[bytes, ...] = ()
) -> m.LoadReply:
    """Return the answer to Load that a record makes."""
    fresh = bool(record.flags & RecordFlags.FRESH)
    return m.LoadReply(
        vtpm=record.uuid.bytes,
        family="1.2" if record.flags & RecordFlags.TPM12 else "2.0",
        lease=running.lease,
        fresh=fresh,
        key=b"" if fresh else record.key.reveal(),
        digest=b"" if fresh else record.digest,
        generation=record.generation,
        startup=startup,
        commit_timeout=commit_timeout,
        hw_pcrs=running.hw_pcrs,
        measured=measured,
        # instances of before this field are told nothing that they cannot read: they know no "deactivated" either
        after_reset=_DEACTIVATED if running.after_reset == _DEACTIVATED != startup else "",
        **running.terms,
    )


def objection(running: Running, record: VtpmRecord, commit: m.Commit) -> m.Refusal | None:
    """Return why this commit may not be made, or None."""
    if len(commit.key) != StateKey.size or len(commit.digest) != _DIGEST_SIZE:
        return m.Refusal(m.RefusalCode.MALFORMED, "a key and a digest have 32 bytes")
    away = migration_records.objection(record.flags, claimed=bool(commit.restored))
    if away is not None:
        return m.Refusal(m.RefusalCode.DENIED, away)
    if commit.lease != running.lease:
        return m.Refusal(m.RefusalCode.STALE_LEASE, "another instance holds this vTPM")
    if commit.generation not in (record.generation, record.generation + 1):
        text = f"generation {commit.generation} cannot follow {record.generation}"
        return m.Refusal(m.RefusalCode.STALE_GENERATION, text)
    if commit.generation == record.generation and not same_triple(record, commit):
        return m.Refusal(m.RefusalCode.STALE_GENERATION, f"generation {commit.generation} is another state already")
    return None


def committed(record: VtpmRecord, commit: m.Commit, running: Running, *, sleeps: bool) -> VtpmRecord:
    """Return the record that a commit makes of one; with `sleeps`, of a vTPM that hibernates.

    A quarantine ends with the state that loads: whoever commits has loaded it.
    """
    flags = int(record.flags) & _STAY
    if commit.final:
        flags |= _RESUMABLE
    if sleeps:
        flags |= _HIBERNATED
    key = StateKey(commit.key)
    new = VtpmRecord(record.uuid, record.group, key, commit.digest, commit.generation, RecordFlags(flags), record.epoch)
    return marked(new, running)


def same_triple(record: VtpmRecord, commit: m.Commit) -> bool:
    """Tell whether a record names the very state that is to be committed."""
    return record.digest == commit.digest and record.key == StateKey(commit.key)


def same(old: VtpmRecord, new: VtpmRecord) -> bool:
    """Tell whether there is nothing to write; a generation names its key and digest."""
    return old.generation == new.generation and old.flags == new.flags and old.epoch == new.epoch


def marked(record: VtpmRecord, running: Running) -> VtpmRecord:
    """Return the record as that of a vTPM attached with the epoch that its instance runs for."""
    if not running.epoch or (record.epoch == running.epoch and int(record.flags) & _ATTACHED):
        return record
    return replace(record, flags=record.flags | RecordFlags.ATTACHED, epoch=running.epoch)
