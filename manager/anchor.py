"""The rollback rule (design section 7), pure: may this store be opened, given what the hardware TPM holds?

Two anchors. The *durable* one is an NV index with the digest of a store state. The *volatile* one is PCR 22,
extended with digests in the background. A store carries, authenticated, what it knows of both: the digest the index
holds, the one that was about to be written (a write may or may not have happened when power fails), and the values
PCR 22 has before and after the extend in progress.
"""

import hashlib
import hmac
from dataclasses import dataclass
from enum import Enum
from typing import Final

from manager.errors import IntegrityError, RolledBackError

DIGEST_SIZE: Final = 32
_NONE: Final = bytes(DIGEST_SIZE)  # in a note: nothing; no store has this digest
# TPM 2.0 PC Client Profile: PCR 17-22 start as all ones, a D-RTM launch makes them all zeros
PCR22_AFTER_RESET: Final = (b"\xff" * DIGEST_SIZE, b"\x00" * DIGEST_SIZE)


class Standing(Enum):
    """How an acceptable store stands to the durable anchor."""

    CLEAN = "clean"  # it is the state of a clean stop: no save can have been made after it
    EQUAL = "equal"  # it is the anchored state of a manager that did not stop cleanly
    DESCENDS = "descends"  # it was written after that state


@dataclass(frozen=True, slots=True)
class Notes:
    """What a store carries of the anchors beside the digest that the index holds; 32 bytes each, zeros for none.

    `pending` was about to be written to the index when the store was written. PCR 22 held `pcr_before`, and was about
    to be extended by `extending`. (Earlier managers noted there what it was going to hold; `judge` takes that too.)
    """

    pending: bytes = bytes(DIGEST_SIZE)
    pcr_before: bytes = bytes(DIGEST_SIZE)
    extending: bytes = bytes(DIGEST_SIZE)

    def pack(self) -> bytes:
        """Return the 96 bytes that the store keeps."""
        return self.pending + self.pcr_before + self.extending

    def pcr22_values(self) -> tuple[bytes, ...]:
        """Return what PCR 22 may hold beside a store with these notes, but for its values after a reset of the TPM.

        Before the extend; after it; after it where the TPM was reset between the note and the extend, so that it
        began at another value; and what a note of an earlier manager names as the value after it.
        """
        if self.extending == _NONE:
            return (self.pcr_before,)
        begins = (self.pcr_before, *PCR22_AFTER_RESET)
        return self.pcr_before, self.extending, *(extended(value, self.extending) for value in begins)

    @classmethod
    def unpack(cls, kept: bytes) -> "Notes":
        """Read what `pack` wrote; nothing kept yet is no notes.

        Raises:
            IntegrityError: another length.

        """
        if not kept:
            return cls()
        if len(kept) != 3 * DIGEST_SIZE:
            raise IntegrityError(f"the store's notes on its anchors have {len(kept)} bytes, not {3 * DIGEST_SIZE}")
        return cls(kept[:DIGEST_SIZE], kept[DIGEST_SIZE : 2 * DIGEST_SIZE], kept[2 * DIGEST_SIZE :])


@dataclass(frozen=True, slots=True)
class StorePosition:
    """What a store says of itself: its digest, the digest that the index is known to hold (32 bytes each), notes."""

    digest: bytes
    held: bytes
    notes: Notes


def extended(value: bytes, digest: bytes) -> bytes:
    """Return what a SHA-256 PCR with `value` holds after TPM2_PCR_Extend of `digest` (Part 3, 22.2)."""
    return hashlib.sha256(value + digest).digest()


def clean_stop(digest: bytes) -> bytes:
    """Return what the durable anchor holds after a clean stop at `digest`; an open replaces it before serving."""
    return hashlib.sha256(b"vtpm-manager clean stop v1" + digest).digest()


def judge(position: StorePosition, durable: bytes, pcr22: bytes | None) -> Standing:
    """Decide whether the store at `position` may be opened.

    `durable` is the NV index's content; `pcr22` the PCR's value, None where there is no volatile anchor.

    Raises:
        RolledBackError: it is older than, or a fork of, the store the anchors stand for.

    """
    if hmac.compare_digest(clean_stop(position.digest), durable):
        return Standing.CLEAN
    if hmac.compare_digest(position.digest, durable):
        standing = Standing.EQUAL
    elif durable != _NONE and any(
        hmac.compare_digest(durable, known) for known in (position.held, position.notes.pending)
    ):
        standing = Standing.DESCENDS
    else:
        raise RolledBackError(
            "the store is not the one the hardware TPM's durable anchor stands for: it is an older copy, or was "
            "written by another installation, or its newest root or last log frame is "
            "damaged. Nothing was changed. Put the newest store image and state images back; "
            "docs/rollback.md explains what else can be done"
        )
    if not _agrees(position, pcr22):
        raise RolledBackError(
            "PCR 22 of the hardware TPM says that newer saves were made since this machine started: the store is an "
            "older copy (or another manager uses this TPM). Nothing was changed. Put the newest store image and "
            "state images back; docs/rollback.md explains what else can be done"
        )
    return standing


def _agrees(position: StorePosition, pcr22: bytes | None) -> bool:
    if pcr22 is None or pcr22 in PCR22_AFTER_RESET:
        return True
    return pcr22 in position.notes.pcr22_values()
