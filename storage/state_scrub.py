"""Scrubbing of a state image: the slot that does not count, and what is behind the state in the one that does.

They hold earlier states, each encrypted under a key that no record has any more; a copied old store may still have it.
"""

import os
from uuid import UUID

from storage import state_format as fmt
from storage.disk import Device, Disk
from storage.state_image import SlotState, StateImage

_ATOM = 512  # what a power cut leaves whole: the one in which the live state ends is not touched


def scrub_image(disk: int | Disk, vtpm: UUID, store: UUID, digest: bytes) -> bool:
    """Overwrite what is not the state with this digest (SHA-256 of its slot); durable on return.

    The caller holds the image's lock. False, with nothing changed: neither slot is the one, so every byte is kept.
    Of the slot that counts up to 511 bytes behind the state stay. Raises what StateImage.open raises; DeviceError.
    """
    image = StateImage.open(disk, vtpm, store)
    slots = image.describe()
    live = next((slot for slot in slots if slot.state is SlotState.WRITTEN and slot.digest == digest), None)
    if live is None or live.plaintext_bytes is None:
        return False
    device = Device(disk)
    length = fmt.SlotHeader.size() + live.plaintext_bytes + fmt.TAG_BYTES
    chunks = min((device.size() - fmt.HEADER_BYTES) // (2 * fmt.CHUNK), fmt.MAX_CHUNKS)
    for chunk in range(chunks):
        other = bytearray(os.urandom(fmt.CHUNK))
        if not chunk:
            other[: fmt.SlotHeader.size()] = bytes(fmt.SlotHeader.size())  # so that it reads as never written
        device.write(other, fmt.chunk_offset(1 - live.slot, chunk))
        used = min(max(length - chunk * fmt.CHUNK, 0), fmt.CHUNK)
        kept = -(-used // _ATOM) * _ATOM
        if kept < fmt.CHUNK:
            device.write(os.urandom(fmt.CHUNK - kept), fmt.chunk_offset(live.slot, chunk) + kept)
    device.flush()
    return True
